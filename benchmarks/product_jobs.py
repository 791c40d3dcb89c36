"""Work of the product that has no command of its own, for `ratios.py`: what the steps of a run call.

python benchmarks/product_jobs.py base MODEL TEXT CHUNKS OUT     # a base file, as the step `base` makes it
python benchmarks/product_jobs.py rungs MODEL IMATRIX FOLDER     # the twelve usual rungs, as the steps `quantize` do
"""

import pathlib
import sys

from bitladder.evaluate import MeasureOptions, make_base
from bitladder.quantize import RUNGS, quantize
from bitladder.text import load_text


def main() -> None:
    job, model, *rest = sys.argv[1:]
    if job == "base":
        text, chunks, out = rest
        make_base(pathlib.Path(model), load_text(text), pathlib.Path(out), MeasureOptions(chunks=int(chunks)))
    elif job == "rungs":
        imatrix, folder = rest
        made: list[pathlib.Path] = []
        for rung in RUNGS:
            out = pathlib.Path(folder) / f"{rung}.gguf"
            quantize(model, out, rung, imatrix=imatrix, same=made)
            made.append(out)
    else:
        sys.exit(f"no job {job}")


if __name__ == "__main__":
    main()
