"""Files: downloads with a cache (`storage.remote`) and weights of networks (`storage.weights`)."""
