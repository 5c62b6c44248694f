"""Samples in tar files ("shards"), read one after another from a disk, a web server, an object store or a command."""
