"""How fast and how large: the policy's shared prefix against its own naive path, the library and TRL."""
