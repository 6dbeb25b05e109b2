"""Process groups and the CPU seam. Importing this package makes megatron-core usable without CUDA and without Apex."""

from moss_train.parallel import cpu_seam

cpu_seam.install()  # before anything imports megatron
