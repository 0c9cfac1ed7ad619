"""A short time on a machine with a GPU: `gpu_day.sh` runs everything, most valuable first; see README.md."""
