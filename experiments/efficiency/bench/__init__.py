"""How fast and how large: the policy's shared prefix against its own naive path, the library and TRL."""

from tartvg.launch.processes import prepare_allocator

prepare_allocator()  # as a run does it: before anything here imports torch
