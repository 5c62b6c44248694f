import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from spt_dist import UserError
from spt_dist.data.lists.hub import HubSet, build_hub
from spt_dist.data.pictures import PicturePreparation
from spt_dist.data.samples import BadSampleError
from tests.data.pictures_for_tests import encode, noise, write_image


@pytest.fixture
def mnist(tmp_path: Path) -> tuple[Path, np.ndarray]:
    """MNIST's own files, with six and three noisy digits."""
    folder = tmp_path / "MNIST/raw"
    folder.mkdir(parents=True)
    grey_NHW = np.random.default_rng(0).integers(0, 256, (9, 28, 28), dtype=np.uint8)
    for name, images in (("train", grey_NHW[:6]), ("t10k", grey_NHW[6:])):
        labels = np.arange(len(images), dtype=np.uint8)
        (folder / f"{name}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, *images.shape) + images.tobytes())
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, len(labels)) + labels.tobytes())
    return tmp_path, grey_NHW


def test_a_data_set_of_torchvision(mnist: tuple[Path, np.ndarray]) -> None:
    root, grey_NHW = mnist
    task = build_hub("torch/mnist", 10, str(root), transform="vtab_raw", image_size=28)
    assert (task.num_train, task.num_val, task.num_classes) == (6, 3, 10)
    assert isinstance(task.val, HubSet)
    image, label = task.val.item(None, 2)
    assert label == 2
    assert torch.equal(image, torch.from_numpy(grey_NHW[8]).expand(3, 28, 28))
    assert task.val.blank()[0].shape == image.shape
    assert torch.allclose(task.val.finish([image], None, [2])[0] * 255, image.float())


def test_a_label_out_of_range_is_named(mnist: tuple[Path, np.ndarray]) -> None:
    task = build_hub("torch/mnist", 5, str(mnist[0]), image_size=28)
    assert isinstance(task.train, HubSet)
    with pytest.raises(BadSampleError, match=r"^torch/mnist, train: sample 5: class 5 has to lie between 0 and 4$"):
        task.train.item(0, 5)


def test_a_data_set_of_the_hugging_face_hub(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    for split in ("train", "validation"):
        for label in ("owl", "jay"):
            for number in range(2):
                write_image(tmp_path / "birds" / split / label / f"{number}.png", seed=number)
    (tmp_path / "birds/validation/owl/1.png").write_text("no image")
    task = build_hub(f"hfds/{tmp_path / 'birds'}", 2, str(tmp_path / "cache"), transform="vtab_raw", image_size=16)
    assert (task.num_train, task.num_val) == (4, 4)
    assert isinstance(task.val, HubSet)
    labels, bad = [], []
    for index in range(4):
        try:
            image, label = task.val.item(None, index)
            labels.append(label)
            assert image.shape == (3, 16, 16)
        except BadSampleError as error:
            bad.append(str(error))
    # Classes in sorted order; no other image took the place of the bad one.
    assert sorted(labels) == [0, 0, 1]
    assert len(bad) == 1
    assert "validation: sample" in bad[0]


def test_readers_of_timm_that_open_files() -> None:
    """Without the data set around the reader, which would skip to the next sample that can be read."""

    class Reader:
        def __getitem__(self, index: int) -> tuple[object, int]:
            from io import BytesIO

            return BytesIO(encode(noise(20, 20)) if index else b"no image"), index

        def __len__(self) -> int:
            return 2

    class Dataset:
        reader = Reader()

    dataset = HubSet(Dataset(), "hfds/birds, train", 2, PicturePreparation("vtab", 16), True, 0)
    assert len(dataset) == 2
    assert dataset.item(0, 1)[1] == 1
    with pytest.raises(BadSampleError, match=r"^hfds/birds, train: sample 0: is no image"):
        dataset.item(0, 0)


def test_columns_have_other_names(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "birds").mkdir()
    for split in ("train", "validation"):
        rows = {"img": [{"bytes": encode(noise(20, 20)), "path": None}] * 2, "fine": [1, 0]}
        parquet.write_table(arrow.table(rows), tmp_path / f"birds/{split}.parquet")
    name, cache = f"hfds/{tmp_path / 'birds'}", str(tmp_path / "cache")
    task = build_hub(name, 2, cache, image_column="img", label_column="fine")
    assert isinstance(task.train, HubSet)
    assert [task.train.item(0, index)[1] for index in range(2)] == [1, 0]


def test_columns_are_the_hub_s_alone(mnist: tuple[Path, np.ndarray]) -> None:
    with pytest.raises(UserError, match=r"data\.name='torch/mnist' has no columns; leave out data\.image_column"):
        build_hub("torch/mnist", 10, str(mnist[0]), label_column="digit")


@pytest.mark.parametrize("name", ["", "imagenet", "wds/birds", "torch/image_folder", "torch/folder", "hfids/birds"])
def test_names_that_others_are_for_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=rf"data\.name='{name}' has to begin with 'hfds/' or 'torch/'; for folders .*"):
        build_hub(name, 10, "/nowhere")


def test_what_timm_can_not_open_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.name='torch/cifar100', split 'train': RuntimeError: Dataset not found"):
        build_hub("torch/cifar100", 100, str(tmp_path))
    with pytest.raises(UserError, match=r"data\.name='torch/birds', .* Unknown torchvision dataset birds"):
        build_hub("torch/birds", 100, str(tmp_path))


def test_without_the_package_of_the_hub() -> None:
    try:
        import datasets  # noqa: F401
    except ModuleNotFoundError:
        with pytest.raises(UserError, match=r"data\.name='hfds/birds' needs datasets: pip install datasets"):
            build_hub("hfds/birds", 10)
    else:
        pytest.skip("datasets is installed")


def test_numbers_out_of_range_are_refused() -> None:
    with pytest.raises(UserError, match=r"data\.num_classes=0 has to be at least 1"):
        build_hub("torch/mnist", 0)
    with pytest.raises(UserError, match=r"data\.num_workers=-1 has to be 0 or more"):
        build_hub("torch/mnist", 10, num_workers=-1)
