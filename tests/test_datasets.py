"""Data sets from folders and archives."""

import contextlib
import hashlib
import http.server
import io
import os
import pickle
import socket
import struct
import tarfile
import threading
from typing import ClassVar

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from tests.helpers.folders import as_files, damage, noise, numbered_images, save
from utils import datasets
from utils.datasets import FileImages, ImageError, class_names, load_datasets

CPU = torch.device("cpu")


# ---- folders of pictures ----


def test_a_folder_gives_sorted_classes_and_all_its_pictures(folder):
    data = load_datasets(str(folder), "", 2)
    assert data.classes == ["cat", "dog"]
    assert data.train.labels.tolist() == [0] * 5 + [1] * 5
    assert data.test.labels.tolist() == [0] * 3 + [1] * 3
    assert data.train.images.dtype == torch.uint8
    with Image.open(folder / "train" / "dog" / "2.png") as picture:
        assert torch.equal(data.train.images[7].permute(1, 2, 0), torch.from_numpy(np.array(picture)))


def test_the_names_of_classes_need_no_pictures(folder, tmp_path):
    assert class_names(str(folder)) == load_datasets(str(folder), "", 1).classes
    assert class_names("digits") == list("0123456789")
    (tmp_path / "none" / "train" / ".hidden").mkdir(parents=True)
    for path in (tmp_path / "none", tmp_path / "none" / "train"):
        with pytest.raises(ValueError, match="has no class folders"):
            class_names(str(path))
    with pytest.raises(ValueError, match="neither a folder nor a known data set"):
        class_names("mnist")


def test_val_stands_in_for_test(folder):
    (folder / "test").rename(folder / "val")
    assert len(load_datasets(str(folder), "", 1).test) == 6


def test_test_comes_before_val(folder, rng):
    save(noise(rng), folder, "val", "cat", "0.png")
    assert len(load_datasets(str(folder), "", 1).test) == 6


@pytest.mark.parametrize("name", ["upper.PNG", "photo.JPG", "photo.jpeg", "x.bmp", "x.webp", "deeper/still/x.png"])
def test_pictures_of_many_names_are_found(folder, rng, name):
    save(noise(rng), folder, "train", "cat", name)
    assert len(load_datasets(str(folder), "", 1).train) == 11


@pytest.mark.parametrize("name", ["notes.txt", ".hidden.png", "Thumbs.db", "labels.csv", ".ipynb_checkpoints/0.png"])
def test_other_files_and_hidden_ones_are_passed_over(folder, name):
    path = folder / "train" / "cat" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes((folder / "train" / "cat" / "0.png").read_bytes())
    assert len(load_datasets(str(folder), "", 1).train) == 10


@pytest.mark.parametrize("split", ["train", "test"])
def test_hidden_folders_are_no_classes(folder, rng, split):
    save(noise(rng), folder, split, ".ipynb_checkpoints", "0.png")
    assert load_datasets(str(folder), "", 1).classes == ["cat", "dog"]


def test_sixteen_bit_grey_keeps_its_levels(tmp_path):
    grey = np.arange(0, 65536, 4096, dtype=np.uint16).reshape(4, 4)
    path = save(Image.fromarray(grey), tmp_path, "a.png")
    got = np.array(datasets.read_image(path))
    np.testing.assert_allclose(got, np.repeat(grey[..., None] / 257, 3, axis=2), atol=1)


@pytest.mark.parametrize(("level", "grey"), [(200, 200), (51400, 200), (70000, 255)])
def test_thirty_two_bit_grey_is_taken_as_bytes_or_as_sixteen_bits(tmp_path, level, grey):
    path = save(Image.new("I", (4, 4), level), tmp_path, "a.tiff")
    assert set(np.array(datasets.read_image(path)).ravel()) == {grey}


def test_photos_of_one_size_are_not_held_in_memory(tmp_path, rng):
    for split, name in (("train", "cat"), ("test", "cat")):
        save(noise(rng, 257, 257), tmp_path, split, name, "0.png")
    data = load_datasets(str(tmp_path), "", 1)
    assert isinstance(data.train, FileImages)


def test_a_link_that_leads_back_up_does_not_multiply_the_pictures(folder):
    before = len(load_datasets(str(folder), "", 1).train)
    (folder / "train" / "dog" / "loop").symlink_to(folder / "train" / "dog", target_is_directory=True)
    assert len(load_datasets(str(folder), "", 1).train) == before


@pytest.mark.parametrize("missing", ["train", "test", "both"])
def test_a_folder_without_its_splits_is_refused_with_the_layout(folder, missing):
    for split in ("train", "test") if missing == "both" else (missing,):
        (folder / split).rename(folder / f"not_{split}")
    with pytest.raises(ValueError, match=r"train/<class>/ and test/<class>/ \(or val/<class>/\)") as e:
        load_datasets(str(folder), "", 1)
    assert str(folder) in str(e.value)


def test_a_train_folder_without_classes_is_refused(tmp_path, rng):
    save(noise(rng), tmp_path, "train", "0.png")
    save(noise(rng), tmp_path, "test", "cat", "0.png")
    with pytest.raises(ValueError, match="has no class folders"):
        load_datasets(str(tmp_path), "", 1)


def test_a_test_class_that_train_has_not_is_named(folder, rng):
    save(noise(rng), folder, "test", "zebra", "0.png")
    with pytest.raises(ValueError, match="zebra") as e:
        load_datasets(str(folder), "", 1)
    assert "cat" not in str(e.value).replace(str(folder), "")


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_class_without_pictures_is_named(folder, split):
    for picture in (folder / split / "dog").iterdir():
        picture.rename(picture.with_suffix(".txt"))
    with pytest.raises(ValueError, match="holds no picture") as e:
        load_datasets(str(folder), "", 1)
    assert str(folder / split / "dog") in str(e.value)


WRONG_LAYOUTS = {
    "no train": lambda root: (root / "train").rename(root / "elsewhere"),
    "no test": lambda root: (root / "test").rename(root / "elsewhere"),
    "no classes": lambda root: [c.rename(root / c.name) for c in sorted((root / "train").iterdir())],
    "a class that is only tested": lambda root: (root / "train" / "cat").rename(root / "cat"),
    "a class that is not tested": lambda root: (root / "test" / "cat").rename(root / "cat"),
    "an empty class": lambda root: (root / "test" / "zebra").mkdir() or (root / "train" / "zebra").mkdir(),
    "a class of other files": lambda root: [
        p.rename(p.with_suffix(".txt")) for p in sorted((root / "train" / "dog").iterdir())
    ],
    "hidden pictures only": lambda root: [
        p.rename(p.with_name("." + p.name)) for p in sorted((root / "test" / "dog").iterdir())
    ],
    "nothing": lambda root: root.rename(root.with_name("elsewhere")),
}


@pytest.mark.parametrize("case", WRONG_LAYOUTS)
def test_a_wrong_layout_is_told_before_anything_is_read_and_in_the_same_words(folder, monkeypatch, case):
    WRONG_LAYOUTS[case](folder)
    with pytest.raises(ValueError, match=str(folder)) as loading:
        load_datasets(str(folder), "", 1)
    monkeypatch.setattr(Image, "open", None)
    with pytest.raises(ValueError, match=str(folder)) as checking:
        datasets.check_layout(str(folder))
    assert str(checking.value) == str(loading.value)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "digits"])
def test_named_data_sets_have_no_layout_and_are_not_downloaded_to_check_it(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    datasets.check_layout(name)
    assert os.listdir() == []


def test_a_layout_is_fine_with_pictures_in_deeper_folders_and_behind_links(folder, rng):
    for split in ("train", "test"):
        save(noise(rng), folder, split, "bee", "deeper", "still", "0.PNG")
    (folder / "test").rename(folder / "elsewhere")
    (folder / "val").symlink_to(folder / "elsewhere")
    (folder / "train" / "dog" / "loop").symlink_to(folder / "train")
    datasets.check_layout(str(folder))
    assert load_datasets(str(folder), "", 1).classes == ["bee", "cat", "dog"]


@pytest.mark.parametrize("name", ["imagenet", "CIFAR10", "no/such/folder"])
def test_an_unknown_name_lists_the_known_ones(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="cifar10, cifar100, digits") as e:
        load_datasets(name, "", 1)
    assert name in str(e.value)


@pytest.mark.parametrize("how", ["noise", "empty", "cut_off"])
@pytest.mark.parametrize("which", ["0.png", "3.png"])
def test_an_unreadable_picture_is_named_while_decoding_into_memory(folder, how, which):
    path = folder / "train" / "dog" / which
    damage(path, how)
    with pytest.raises(ImageError, match="cannot be read as a picture") as e:
        load_datasets(str(folder), "", 2)
    assert str(path) in str(e.value)


# ---- digits ----


def test_digits_are_rgb_bytes_of_ten_classes():
    data = load_datasets("digits", "no such folder", 1)
    assert data.classes == list("0123456789")
    for pictures, count in ((data.train, 1437), (data.test, 360)):
        assert pictures.images.shape == (count, 3, 32, 32)
        assert pictures.images.dtype == torch.uint8
        assert torch.equal(pictures.images[:, 0], pictures.images[:, 2])
        assert pictures.labels.shape == (count,)
        assert pictures.labels.dtype == torch.int64
        shares = pictures.labels.bincount() / count
        assert len(shares) == 10
        assert shares.sub(0.1).abs().max() < 0.01
    assert data.train.images.max() == 255


def test_digits_are_scikit_learns():
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    grey = torch.from_numpy(digits.images).float()[:, None] * (255 / 16)
    expected = torch.nn.functional.interpolate(grey, (32, 32), mode="bilinear", align_corners=False).round().byte()
    data = load_datasets("digits", "", 1)
    images = torch.cat((data.train.images, data.test.images))[:, :1]
    labels = torch.cat((data.train.labels, data.test.labels))

    def multiset(images, labels):
        return sorted((int(label), image.numpy().tobytes()) for image, label in zip(images, labels))

    assert multiset(images, labels) == multiset(expected, digits.target)


# ---- CIFAR archives ----


class Python2Pickler(pickle._Pickler):
    """Writes strings and bools as Python 2 did, who made the published files."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_string(self, text):
        content = text if isinstance(text, bytes) else text.encode()
        short = len(content) < 256
        self.write(pickle.SHORT_BINSTRING if short else pickle.BINSTRING)
        self.write(struct.pack("B" if short else "<i", len(content)) + content)
        self.memoize(text)

    dispatch[str] = dispatch[bytes] = save_string
    dispatch[bool] = lambda self, value: self.save_long(int(value))


def python2_pickle(value):
    buffer = io.BytesIO()
    pickler = Python2Pickler(buffer, protocol=2)
    pickler.memo[None] = None  # Python 2 counts what it has written from 1
    pickler.dump(value)
    return buffer.getvalue()


def tar_gz(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def md5(content):
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


class Server:
    """Serves one archive over HTTP on 127.0.0.1."""

    def __init__(self):
        self.content = b""
        self.announced_bytes = None
        self.fetchable = True
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self):
                self.send_response(200)
                size = len(outer.content) if outer.announced_bytes is None else outer.announced_bytes
                self.send_header("Content-Length", str(size))
                self.end_headers()

            def do_GET(self):
                if not outer.fetchable:
                    self.send_error(404)
                    return
                self.do_HEAD()
                self.wfile.write(outer.content)

            def log_message(self, *args):
                pass

        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def close(self):
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()


@pytest.fixture
def server(monkeypatch):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    server = Server()
    yield server
    with contextlib.suppress(OSError):
        server.close()


class FakeCifar:
    """A small data set in CIFAR's format, put in the place of the published one."""

    def __init__(self, name, server, monkeypatch, rng):
        self.name, self.server = name, server
        fine = name == "cifar100"
        self.classes = class_names(name)
        self.folder = "cifar-100-python" if fine else "cifar-10-batches-py"
        self.archive_name = "cifar-100-python.tar.gz" if fine else "cifar-10-python.tar.gz"
        train = ["train"] if fine else [f"data_batch_{i}" for i in range(1, 6)]
        meta, key = ("meta", "fine_label_names") if fine else ("batches.meta", "label_names")
        self.rows, self.labels = {}, {}
        self.files = {meta: python2_pickle({key: self.classes})}
        for file in [*train, "test" if fine else "test_batch"]:
            split = "test" if file.startswith("test") else "train"
            rows = rng.integers(0, 256, (7, 3072), dtype=np.uint8)
            labels = rng.integers(0, len(self.classes), 7).tolist()
            self.rows.setdefault(split, []).append(rows)
            self.labels.setdefault(split, []).extend(labels)
            batch = {"data": rows, "batch_label": file, "filenames": [f"{i}.png" for i in range(7)]}
            batch |= {"fine_labels": labels, "coarse_labels": [0] * 7} if fine else {"labels": labels}
            self.files[file] = python2_pickle(batch)
        self.archive = tar_gz({f"{self.folder}/{file}": content for file, content in self.files.items()})
        server.content = self.archive

        cls = torchvision.datasets.CIFAR100 if fine else torchvision.datasets.CIFAR10
        assert (cls.base_folder, cls.filename) == (self.folder, self.archive_name)
        assert [file for file, _ in cls.train_list] == train
        md5s = {file: md5(content) for file, content in self.files.items()}
        monkeypatch.setattr(cls, "url", f"{server.url}/{self.archive_name}")
        monkeypatch.setattr(cls, "tgz_md5", md5(self.archive))
        for attribute in ("train_list", "test_list"):
            monkeypatch.setattr(cls, attribute, [[file, md5s[file]] for file, _ in getattr(cls, attribute)])
        monkeypatch.setattr(cls, "meta", {**cls.meta, "md5": md5s[meta]})
        assert cls.meta["filename"] == meta
        self.url = cls.url

    def malicious_archive(self, touched):
        """The archive with code in its batches."""

        class Touch:
            def __reduce__(self):
                return open, (str(touched), "w")

        evil = pickle.dumps(Touch(), protocol=2)
        return tar_gz({f"{self.folder}/{file}": evil for file in self.files})


COARSE = (
    "aquatic_mammals fish flowers food_containers fruit_and_vegetables household_electrical_devices "
    "household_furniture insects large_carnivores large_man-made_outdoor_things large_natural_outdoor_scenes "
    "large_omnivores_and_herbivores medium_mammals non-insect_invertebrates people reptiles small_mammals trees "
    "vehicles_1 vehicles_2"
)


def test_cifars_names_are_those_of_the_published_files():
    """The files that list them, rebuilt, have the md5 that torchvision asks of the published ones."""
    ten = {"num_cases_per_batch": 10_000, "label_names": class_names("cifar10"), "num_vis": 3072}
    assert md5(python2_pickle(ten)) == torchvision.datasets.CIFAR10.meta["md5"]
    hundred = {"fine_label_names": class_names("cifar100"), "coarse_label_names": COARSE.split()}
    assert md5(python2_pickle(hundred)) == torchvision.datasets.CIFAR100.meta["md5"]


@pytest.fixture
def make_cifar(server, monkeypatch, rng):
    return lambda name: FakeCifar(name, server, monkeypatch, rng)


@pytest.fixture
def cifar(make_cifar):
    return make_cifar("cifar10")


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_downloaded_once_and_comes_through(make_cifar, server, tmp_path, name):
    cifar = make_cifar(name)
    root = tmp_path / "data"
    for _ in ("downloaded", "found"):
        data = load_datasets(name, str(root), 1)
        assert data.classes == cifar.classes
        assert class_names(name) == cifar.classes
        for split, pictures in (("train", data.train), ("test", data.test)):
            rows = np.concatenate(cifar.rows[split])
            assert pictures.images.shape == (len(rows), 3, 32, 32)
            assert pictures.images.dtype == torch.uint8
            # A row is the red plane, then the green, then the blue, each by rows of the picture.
            assert np.array_equal(pictures.images.numpy().reshape(len(rows), 3072), rows)
            assert pictures.labels.tolist() == cifar.labels[split]
            assert pictures.labels.dtype == torch.int64
        server.fetchable = False


def test_an_archive_put_there_by_hand_is_taken(cifar, server, tmp_path):
    server.fetchable = False
    with pytest.raises(ConnectionError, match="404"):
        load_datasets("cifar10", str(tmp_path), 1)
    (tmp_path / cifar.archive_name).write_bytes(cifar.archive)
    assert len(load_datasets("cifar10", str(tmp_path), 1).train) == 35


def corrupt(cifar, how, touched):
    content = bytearray(cifar.archive)
    if how == "one_byte":
        content[len(content) // 2] ^= 1
    elif how == "cut_off":
        del content[len(content) // 2 :]
    elif how == "html":
        content = b"<html>Please log in to the network</html>"
    elif how == "malicious":
        content = cifar.malicious_archive(touched)
    return bytes(content)


@pytest.mark.parametrize("how", ["one_byte", "cut_off", "html", "malicious"])
def test_a_corrupted_archive_is_refused_unread_and_the_next_good_one_taken(cifar, server, tmp_path, how):
    touched = tmp_path / "touched"
    server.content = corrupt(cifar, how, touched)
    with pytest.raises(ConnectionError, match="could not be downloaded") as e:
        load_datasets("cifar10", str(tmp_path / "data"), 1)
    assert cifar.url in str(e.value)
    assert not touched.exists()
    assert not (tmp_path / "data" / cifar.folder).exists()
    server.content = cifar.archive
    data = load_datasets("cifar10", str(tmp_path / "data"), 1)
    assert data.train.labels.tolist() == cifar.labels["train"]


def test_a_connection_that_breaks_off_is_a_connection_error_and_the_next_good_one_taken(cifar, server, tmp_path):
    server.announced_bytes = len(cifar.archive)
    server.content = cifar.archive[: len(cifar.archive) // 2]
    with pytest.raises(ConnectionError, match="could not be downloaded"):
        load_datasets("cifar10", str(tmp_path), 1)
    server.content = cifar.archive
    assert len(load_datasets("cifar10", str(tmp_path), 1).train) == 35


def test_a_server_that_is_down_is_a_connection_error_with_the_url_and_the_remedy(cifar, server, tmp_path):
    server.close()
    with pytest.raises(ConnectionError, match=r"put http://.* there yourself") as e:
        load_datasets("cifar10", str(tmp_path), 1)
    assert cifar.url in str(e.value)
    assert torchvision.datasets.CIFAR10.tgz_md5 in str(e.value)


def test_a_server_that_speaks_no_http_is_a_connection_error(cifar, monkeypatch, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", f"http://127.0.0.1:{port}/{cifar.archive_name}")

        def answer():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection:
                        connection.recv(4096)
                        connection.sendall(b"SSH-2.0-OpenSSH\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            with pytest.raises(ConnectionError, match="could not be downloaded"):
                load_datasets("cifar10", str(tmp_path), 1)
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.mark.parametrize("file", ["data_batch_3", "test_batch", "batches.meta"])
def test_an_extracted_file_that_was_tampered_with_is_never_unpickled(cifar, server, tmp_path, file):
    touched = tmp_path / "touched"
    load_datasets("cifar10", str(tmp_path), 1)

    class Touch:
        def __reduce__(self):
            return open, (str(touched), "w")

    (tmp_path / cifar.folder / file).write_bytes(pickle.dumps(Touch()))
    (tmp_path / cifar.archive_name).unlink()
    server.close()
    with pytest.raises(ConnectionError):
        load_datasets("cifar10", str(tmp_path), 1)
    assert not touched.exists()


@pytest.mark.parametrize("file", ["data_batch_3", "test_batch"])
def test_an_extraction_that_was_cut_short_is_done_again(cifar, tmp_path, file):
    load_datasets("cifar10", str(tmp_path), 1)
    (tmp_path / cifar.folder / file).unlink()
    data = load_datasets("cifar10", str(tmp_path), 1)
    assert data.classes == cifar.classes
    assert data.test.labels.tolist() == cifar.labels["test"]


# ---- on a device ----


def test_pictures_move_to_a_device_once():
    pictures, meta = numbered_images(5), torch.device("meta")
    moved = pictures.to(meta)
    assert (moved.images.device, moved.labels.device) == (meta, meta)
    assert (moved.images.shape, moved.images.dtype) == (pictures.images.shape, torch.uint8)
    for here, device in ((pictures, CPU), (moved, meta)):  # where they already are, nothing is copied
        again = here.to(device)
        assert again.images is here.images
        assert again.labels is here.labels


def test_a_data_set_moves_its_pictures_in_memory_and_leaves_files_where_they_are(tmp_path):
    pictures, meta = numbered_images(5), torch.device("meta")
    files = as_files(numbered_images(3), tmp_path)
    data = datasets.DataSets(pictures, files, ["a", "b"]).to(meta)
    assert data.train.images.device == meta
    assert data.test is files
    assert data.classes == ["a", "b"]
