"""Annotations and videos: one file per data set, all into `GroundingSample`."""
