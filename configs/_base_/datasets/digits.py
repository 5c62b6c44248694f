# scikit-learn's handwritten digits: 1,000 images train (as in VTAB-1k), 797 are held out.
data = dict(type="digits", image_size=32, num_train=1000, seed=0)
