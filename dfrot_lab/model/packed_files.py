"""A folder in the compressed-tensors format as a folder of plain weights: exactly the values its codes stand
for. Kept in the store, made once."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from dfrot_lab.disk.artefacts import Store, Writer
from dfrot_lab.disk.atomic import Changed
from dfrot_lab.model import files, folder, packed

KIND = "model"
SHARD = 2 << 30  # bytes of weights after which another file is begun
VERSION = 2  # of what is made of a folder: raise it when the same folder becomes something else


def told(place: Path) -> Any:
    """What the config in a folder says of its quantization; None where it is a plain model."""
    return files.read_object(place / "config.json").get("quantization_config")


def plain(place: Path, source: str, key: str, key_now: Callable[[], str], store: Store) -> tuple[Path, str]:
    """The quantized folder with this key, as a folder of weights in the store, and words that say what it
    is. ValueError: it is quantized in no form that is read. Changed: `key_now` is another one afterwards."""
    said = told(place)
    bits = packed.bits_of(source, said)

    def convert(writer: Writer) -> None:
        places = dict[str, str]()
        for number, tensors in enumerate(_lots(place, bits, packed.group_of(said)), 1):
            name = f"model-{number:05d}"
            writer.save_tensors(name, tensors)
            places |= dict.fromkeys(tensors, f"{name}.safetensors")
        writer.save_json(Path(files.INDEX).stem, {"metadata": {}, "weight_map": places})
        config = folder.config_of(place, source)
        folder.keep_words(writer, config, folder.tokenizer_of(str(place), config.vocab_size, key))
        writer.note["provenance"] = f"{bits}-bit {packed.METHOD} weights of {Path(source).name}"
        if key_now() != key:
            raise Changed(f"{source} was changed while it was read: run the same command again")

    artefact = store.get_or_make(KIND, {"packed": key, "version": VERSION}, convert)
    return artefact.path, str(artefact.manifest["note"]["provenance"])


def _lots(place: Path, bits: int, size: int | None) -> Iterator[dict[str, Tensor]]:
    """The tensors of a folder, codes made weights, as many together as SHARD holds."""
    lot, filled = dict[str, Tensor](), 0
    with files.explained(f"the weights in {place} are damaged or not this model's", files.AGAIN):
        for name, x in _unpacked(place, bits, size):
            if lot and filled + x.nbytes > SHARD:
                yield lot
                lot, filled = {}, 0
            lot[name] = x
            filled += x.nbytes
    yield lot


def _unpacked(place: Path, bits: int, size: int | None) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a folder, those of one linear together, in whatever files they lie."""
    with ExitStack() as stack:
        where = dict[str, tuple[Path, Any]]()
        for path in files.weights_of(place):
            file = stack.enter_context(safe_open(path, framework="pt"))
            for name in file.keys():  # noqa: SIM118 it is no dict
                files.require_once(name, path, where[name][0] if name in where else None)
                where[name] = path, file
        for group in packed.groups(where):
            own = {name: where[name][1].get_tensor(name) for name in group}
            yield from packed.weights(own, bits, size).items()
