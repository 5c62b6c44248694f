_base_ = ["_vtab.py"]

model = dict(num_classes=5)
data = dict(task="diabetic_retinopathy")
