"""The Wide-ResNet example: its size and shapes, and its reader against broken files."""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from example_scripts import script
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pil = pytest.importorskip("PIL.Image")

import image_folder  # noqa: E402
from common.rejects import Rejects, TooManyRejectedError  # noqa: E402
from image_folder import BrokenImageError, find_images, read_image  # noqa: E402
from resnet import WIDE_RESNET_101_2, Bottleneck, Shape, WideResNet  # noqa: E402

from gq_horovod.advisor.model import WORKLOADS  # noqa: E402


class TestModel:
    def test_the_paper_counts_126886696_parameters(self):
        with torch.device("meta"):
            model = WideResNet(WIDE_RESNET_101_2)
        assert sum(parameter.numel() for parameter in model.parameters()) == 126_886_696
        (known,) = (own for own in WORKLOADS if own.name == "Wide-ResNet-101-2")
        assert (known.parameters, known.tensors) == (126_886_696, len(list(model.parameters())))

    def test_resnet_50_has_its_published_size(self):
        """The same class with other numbers: 25,557,032 parameters, as published widely."""
        with torch.device("meta"):
            model = WideResNet(Shape(blocks=(3, 4, 6, 3), classes=1000))
        assert sum(parameter.numel() for parameter in model.parameters()) == 25_557_032

    def test_stages_of_an_image_of_224(self):
        with torch.device("meta"):
            model = WideResNet(WIDE_RESNET_101_2)
            images = model.stem(torch.empty(2, 3, 224, 224))
            assert images.shape == (2, 64, 56, 56)
            for stage, side in zip(model.stages, (56, 28, 14, 7), strict=True):
                images = stage(images)
                assert images.shape[2:] == (side, side)
            assert images.shape[1] == 2048
            assert model(torch.empty(2, 3, 224, 224)).shape == (2, 1000)

    def test_small_images_keep_their_size(self):
        model = WideResNet(Shape((1, 1), 10, width=4, widening=2, channels=1, large_images=False))
        assert model.stem(torch.zeros(2, 1, 8, 8)).shape == (2, 4, 8, 8)
        assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)

    def test_a_block_adds_to_its_shortcut(self):
        block = Bottleneck(8, 4, 8, 1).eval()
        torch.nn.init.zeros_(block.layers[-1].weight)
        images = torch.randn(1, 8, 5, 5)
        assert torch.equal(block(images), images.relu())

    def test_it_may_be_trained(self):
        torch.manual_seed(0)
        model = WideResNet(Shape((1, 1), 10, width=4, widening=2, channels=1, large_images=False))
        model(torch.randn(4, 1, 8, 8)).sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())


# ------------------------------------------------------------------------------------------ images


def encoded(form: str = "PNG", mode: str = "RGB", size: tuple[int, int] = (20, 12)) -> bytes:
    """A file of red with noise."""
    pixels = np.random.default_rng(0).integers(0, 60, (size[1], size[0], 3)).astype(np.uint8)
    pixels[..., 0] += 190
    buffer = io.BytesIO()
    pil.fromarray(pixels).convert(mode).save(buffer, form)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("dog", "cat"):
        (tmp_path / name / "deeper").mkdir(parents=True)
        for number in range(3):
            (tmp_path / name / f"{number}.png").write_bytes(encoded())
        (tmp_path / name / "deeper" / "x.JPEG").write_bytes(encoded("JPEG"))
        (tmp_path / name / "notes.txt").write_text("no image")
    return tmp_path


class TestFolder:
    def test_images_are_found_in_order(self, folder):
        images = find_images(folder)
        assert images.classes == ("cat", "dog")
        assert [str(p.relative_to(folder)) for p in images.files] == [
            *("cat/0.png", "cat/1.png", "cat/2.png", "cat/deeper/x.JPEG"),
            *("dog/0.png", "dog/1.png", "dog/2.png", "dog/deeper/x.JPEG"),
        ]
        assert images.labels.tolist() == [0] * 4 + [1] * 4

    def test_another_folder_follows_the_classes_of_the_first(self, folder):
        images = find_images(folder, ("ape", "cat", "dog"))
        assert images.labels.tolist() == [1] * 4 + [2] * 4
        with pytest.raises(ValueError, match=r"the class 'dog' is none of the 2 classes"):
            find_images(folder, ("ape", "cat"))

    def test_missing_things(self, folder):
        with pytest.raises(FileNotFoundError, match="nowhere: expected a folder"):
            find_images(folder / "nowhere")
        with pytest.raises(FileNotFoundError, match="expected one folder for each class"):
            find_images(folder / "cat" / "deeper")
        (folder / "eel").mkdir()
        with pytest.raises(FileNotFoundError, match=r"eel: expected files that end in .jpeg, .jpg"):
            find_images(folder)

    def test_without_pillow(self, folder, monkeypatch):
        monkeypatch.setitem(sys.modules, "PIL", None)
        with pytest.raises(ModuleNotFoundError, match="pip install pillow"):
            read_image(find_images(folder).files[0], 8, None)


class TestImage:
    @pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1", "CMYK"])
    def test_modes(self, mode, tmp_path):
        path = tmp_path / "image"
        path.write_bytes(encoded("JPEG" if mode == "CMYK" else "PNG", mode))
        pixels = read_image(path, 8, None)
        assert pixels.shape == (3, 8, 8)
        assert pixels.dtype == np.float32
        assert np.isfinite(pixels).all()

    def test_colours_are_normalized(self, tmp_path):
        path = tmp_path / "image.png"
        buffer = io.BytesIO()
        pil.new("RGB", (16, 16), (255, 0, 51)).save(buffer, "PNG")
        path.write_bytes(buffer.getvalue())
        pixels = read_image(path, 4, None)
        expected = [(1 - 0.485) / 0.229, (0 - 0.456) / 0.224, (0.2 - 0.406) / 0.225]
        for channel, value in zip(pixels, expected, strict=True):
            assert channel == pytest.approx(value, abs=1e-5)

    def test_crops_are_those_of_the_seed(self, folder):
        images = find_images(folder)
        first = image_folder.training_image(images, 2, 8, (7, 0), Rejects(0))
        again = image_folder.training_image(images, 2, 8, (7, 0), Rejects(0))
        other = image_folder.training_image(images, 2, 8, (7, 1), Rejects(0))
        assert np.array_equal(first[0], again[0])
        assert not np.array_equal(first[0], other[0])
        assert first[1] == 0

    @given(st.integers(1, 3000), st.integers(1, 3000), st.integers(0, 2**32 - 1))
    def test_boxes_lie_in_the_image(self, width, height, seed):
        random = image_folder.random_crop(width, height, np.random.default_rng(seed))
        for left, upper, right, lower in (random, image_folder.middle(width, height)):
            assert 0 <= left < right <= width
            assert 0 <= upper < lower <= height

    def test_middle_is_seven_eighths_of_the_shorter_side(self):
        assert image_folder.middle(512, 256) == (144, 16, 368, 240)


class TestBrokenImages:
    def test_in_training_the_next_image_stands_in(self, folder):
        images = find_images(folder)
        images.files[3].write_bytes(b"")
        images.files[4].write_bytes(encoded()[:100])
        rejects = Rejects(2)
        _, label = image_folder.training_image(images, 3, 8, (0,), rejects)
        assert label == 1
        assert list(rejects.reasons) == [str(images.files[3]), str(images.files[4])]
        image_folder.training_image(images, 4, 8, (0,), rejects)  # counted once
        images.files[0].write_bytes(b"GIF89a")
        with pytest.raises(TooManyRejectedError, match=r"cat/0.png: .*3 records cannot be read"):
            image_folder.training_image(images, 0, 8, (0,), rejects)

    def test_in_validation_it_is_left_out(self, folder):
        images = find_images(folder)
        images.files[0].unlink()
        rejects = Rejects(1)
        assert image_folder.validation_image(images, 0, 8, rejects) is None
        assert "FileNotFoundError" in rejects.reasons[str(images.files[0])]
        pixels, label = image_folder.validation_image(images, 1, 8, rejects)
        assert (pixels.shape, label) == ((3, 8, 8), 0)

    def test_a_folder_of_nothing_else(self, folder):
        images = find_images(folder)
        for path in images.files:
            path.write_bytes(b"x")
        with pytest.raises(BrokenImageError, match="none of 8 images can be read"):
            image_folder.training_image(images, 5, 8, (0,), Rejects(8))

    @pytest.mark.parametrize("form", ["PNG", "JPEG"])
    @given(data=st.data())
    def test_any_damage_gives_an_image_or_the_one_error(self, form, data, tmp_path_factory):
        content = bytearray(encoded(form))
        for _ in range(data.draw(st.integers(1, 5))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        content = content[: data.draw(st.integers(0, len(content)))]
        path = tmp_path_factory.getbasetemp() / "damaged"
        path.write_bytes(content)
        with contextlib.suppress(BrokenImageError):
            pixels = read_image(path, 8, None)
            assert pixels.shape == (3, 8, 8)
            assert np.isfinite(pixels).all()

    @given(st.binary(max_size=200))
    def test_any_bytes(self, tmp_path_factory, content):
        path = tmp_path_factory.getbasetemp() / "bytes"
        path.write_bytes(content)
        with pytest.raises(BrokenImageError):
            read_image(path, 8, None)


# ------------------------------------------------------------------------------------ the workload


@pytest.fixture(scope="module")
def train() -> ModuleType:
    """examples/wide_resnet/train.py; `import train` would find another example's."""
    pytest.importorskip("horovod.torch", exc_type=ImportError)
    return script("wide_resnet")


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Six training and two validation images in two classes."""
    for part, count in (("train", 3), ("val", 1)):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(count):
                (tmp_path / part / name / f"{number}.png").write_bytes(encoded(size=(20, 12)))
    return tmp_path


class TestWorkload:
    def batches(self, train, monkeypatch, rank: int, ranks: int, *arguments: str) -> list:
        """A rank's batches of an epoch but the first."""
        ranked = SimpleNamespace(rank=lambda: rank, size=lambda: ranks)
        monkeypatch.setattr(train, "hvd", ranked)
        options = train.loop.parse(train.ImageClassifier, arguments)
        return list(train.ImageClassifier(options).batches(1, 1))

    def test_the_settings_of_the_paper_s_runs(self, train, monkeypatch):
        monkeypatch.setattr(train, "hvd", SimpleNamespace(rank=lambda: 0, size=lambda: 64))
        arguments = ["--preset", "paper", "--data", "synthetic", "--image-size", "8"]
        workload = train.ImageClassifier(train.loop.parse(train.ImageClassifier, arguments))
        assert workload._shape is WIDE_RESNET_101_2
        options = workload.options
        assert (options.batch_size, options.lr, options.epochs) == (16, 0.1, 90)
        optimizer = workload.optimizer(torch.nn.Linear(2, 2))
        workload.schedule(optimizer, 1000)
        assert optimizer.param_groups[0]["lr"] == 0.1  # from the first step on

    @pytest.mark.parametrize("preset", ["digits", "imagenet"])
    def test_ranks_share_one_global_batch(self, preset, train, monkeypatch, classes):
        arguments = ["--preset", preset, "--data", str(classes), "--image-size", "8"]
        together = {"digits": 60, "imagenet": 2}[preset]

        def batches(rank: int, ranks: int) -> list:
            own = (*arguments, "--batch-size", str(together // ranks))
            return self.batches(train, monkeypatch, rank, ranks, *own)

        whole = batches(0, 1)
        assert len(whole) == {"digits": 1500 // 60 - 1, "imagenet": 2}[preset]
        assert whole[0][0].shape == {"digits": (60, 1, 8, 8), "imagenet": (2, 3, 8, 8)}[preset]
        for rank in (0, 1):
            for mine, all_of_it in zip(batches(rank, 2), whole, strict=True):
                assert torch.equal(mine[0], all_of_it[0][rank::2])
                assert torch.equal(mine[1], all_of_it[1][rank::2])

    def test_broken_images(self, train, classes):
        (classes / "train" / "cat" / "0.png").write_bytes(b"")
        (classes / "val" / "dog" / "0.png").write_bytes(b"")
        options = train.loop.parse(
            train.ImageClassifier,
            ["--preset", "imagenet", "--data", str(classes), "--image-size", "8"],
        )
        rejects = Rejects(2)
        folder = train.Folder(options, rejects)
        rows = iter([np.array([0, 3]), np.array([1])])
        images, labels = zip(*folder.training_batches(rows, 0), strict=True)
        assert [len(some) for some in images] == [2, 1]
        assert torch.cat(labels).tolist() == [0, 1, 0]
        found = list(folder.validation_batches(iter([np.array([0, 1]), np.array([1])])))
        assert [some.tolist() for _, some in found] == [[0], []]
        assert len(rejects) == 2
        rejects.allowed = 0
        (classes / "train" / "dog" / "2.png").write_bytes(b"")
        with pytest.raises(TooManyRejectedError, match=r"dog/2.png"):
            list(folder.training_batches(iter([np.array([5])]), 0))

    def test_the_preset_needs_its_data(self, train, monkeypatch, classes):
        with pytest.raises(ValueError, match="--preset imagenet: expected --data"):
            self.batches(train, monkeypatch, 0, 1, "--preset", "imagenet")
        small = Shape((1,), 1, width=4)
        monkeypatch.setattr(train, "WIDE_RESNET_101_2", small)
        with pytest.raises(ValueError, match=r"expected at most 1 classes, .*got 2"):
            self.batches(train, monkeypatch, 0, 1, "--preset", "imagenet", "--data", str(classes))


class TestSchedule:
    @pytest.mark.parametrize(("warm_up", "steps"), [(0, 10), (3, 10), (100, 10), (0, 0)])
    def test_it_rises_and_falls(self, warm_up, steps):
        from common.schedules import warm_cosine

        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
        schedule = warm_cosine(optimizer, warm_up, steps)
        rates = [optimizer.param_groups[0]["lr"]]
        for _ in range(steps):
            optimizer.step()
            schedule.step()
            rates.append(optimizer.param_groups[0]["lr"])
        warm_up = min(warm_up, steps // 2)
        assert rates[: warm_up + 1] == pytest.approx(
            [2.0 * (k + 1) / warm_up for k in range(warm_up)] + [2.0]
        )
        assert all(a > b for a, b in zip(rates[warm_up:], rates[warm_up + 1 :], strict=False))
        if steps:
            assert rates[-1] == pytest.approx(0)
