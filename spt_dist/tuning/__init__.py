"""What a plan turns into: modules on the backbone, merging them back, and task files."""
