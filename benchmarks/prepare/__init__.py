"""From a local copy of one of the paper's datasets to the common `.npz`. `python -m benchmarks.prepare --help`.

One file per dataset says where its samples, labels and splits are (`read`); `samples.py` is what they say it in;
`audio.py`, `images.py` and `text.py` read one recording each and make features of a batch; `build.py` does the rest.
"""
