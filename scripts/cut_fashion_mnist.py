"""Cut the embedded Fashion-MNIST subset: 10,000 training and 2,000 test images, the same number of each class.

    python scripts/cut_fashion_mnist.py --data /usr/share/datasets/fashion-mnist

The source is the four idx files of Debian's ``dataset-fashion-mnist`` (MIT). Training images come from the official
training split only and test images from the official test split only; the indices into both splits are stored beside
the images, so that the rest of either split can be told apart from what is embedded.
"""

import argparse
import gzip
import io
import zipfile
from pathlib import Path

import numpy as np

OUT = Path(__file__).resolve().parent.parent / "src" / "planish" / "data" / "fashion_mnist" / "fashion_mnist_12k.npz"
MAX_BYTES = 6_000_000


def read_idx(path: Path) -> np.ndarray:
    """The uint8 array of one gzipped idx file."""
    raw = gzip.decompress(path.read_bytes())
    dims = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(raw[3])]
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * len(dims)).reshape(dims)


def balanced(labels: np.ndarray, per_class: int, generator: np.random.Generator) -> np.ndarray:
    """Indices of ``per_class`` images of every class, in the order of the source."""
    picked = [
        generator.choice(np.flatnonzero(labels == c), per_class, replace=False) for c in range(int(labels.max()) + 1)
    ]
    return np.sort(np.concatenate(picked)).astype(np.int32)


def write_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write a compressed npz whose bytes depend on the arrays alone: ``np.savez`` would store the time of day."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, np.ascontiguousarray(array), allow_pickle=False)
            member = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            archive.writestr(member, buffer.getvalue(), zipfile.ZIP_DEFLATED, compresslevel=9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    generator = np.random.default_rng(args.seed)
    arrays = {}
    for split, source, per_class in (("train", "train", 1000), ("test", "t10k", 200)):
        images = read_idx(args.data / f"{source}-images-idx3-ubyte.gz")
        labels = read_idx(args.data / f"{source}-labels-idx1-ubyte.gz")
        index = balanced(labels, per_class, generator)
        arrays[f"{split}_images"], arrays[f"{split}_labels"] = images[index], labels[index]
        arrays[f"{split}_indices"] = index
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_npz(args.out, arrays)
    size = args.out.stat().st_size
    if size > MAX_BYTES:
        args.out.unlink()
        raise SystemExit(
            f"{args.out} would have {size} bytes, more than the {MAX_BYTES} that the package allows itself"
        )
    print(f"{args.out}: {len(arrays['train_labels'])} + {len(arrays['test_labels'])} images, {size} bytes")


if __name__ == "__main__":
    main()
