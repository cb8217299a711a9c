"""One file a command."""

import os

# PyTorch's threads keep their cores busy while they wait for work (libgomp), which takes them from other
# programs: beside one of these, training took up to eight times as long. This many turns are short
# enough for that, and long enough for the next operator of a network. It must be set before PyTorch is
# imported. Who has chosen how threads wait keeps that.
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "2000"
