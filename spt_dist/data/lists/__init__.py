"""The lists of labelled images that the field uses, each as a task."""
