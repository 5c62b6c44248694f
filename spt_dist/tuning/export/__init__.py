"""Finished tasks in other libraries' formats: folders for PEFT and for timm."""
