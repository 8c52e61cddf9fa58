"""CIFAR from its archives, which are downloaded and may be anything."""

import functools
import http.server
import pickle

import numpy as np
import pytest
import torch
import torchvision

from tests.helpers.cifar import FakeCifar, Touch, md5, python2_pickle, tar_gz
from tests.helpers.servers import serving
from utils.datasets import class_names, load_datasets


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, but for what the server's ``fault`` says."""

    def handle(self):
        if self.server.fault == "no http":
            self.request.recv(4096)
            self.wfile.write(b"SSH-2.0-OpenSSH\r\n\r\n")
        else:
            super().handle()

    def copyfile(self, source, output):
        content = source.read()
        output.write(content[: len(content) // 2] if self.server.fault == "breaks off" else content)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    folder = tmp_path / "served"
    folder.mkdir()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
    server.folder, server.fault = folder, None
    with serving(server):
        yield server


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
def cifar(server, monkeypatch, rng):
    return FakeCifar("cifar10", server.folder, server.server_port, monkeypatch, rng)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_downloaded_once_and_comes_through(server, monkeypatch, rng, tmp_path, name, capsys):
    cifar = FakeCifar(name, server.folder, server.server_port, monkeypatch, rng)
    for _ in ("downloaded", "kept"):
        data = load_datasets(name, str(tmp_path / "data"), 1)
        assert data.classes == cifar.classes
        for split, images in (("train", data.train), ("test", data.test)):
            rows = np.concatenate(cifar.rows[split])
            assert images.images.shape == (len(rows), 3, 32, 32)
            # A row is the red plane, then the green, then the blue, each by rows of the image.
            assert np.array_equal(images.images.numpy().reshape(len(rows), 3072), rows)
            assert images.labels.tolist() == cifar.labels[split]
            assert (images.images.dtype, images.labels.dtype) == (torch.uint8, torch.int64)
        cifar.served.unlink(missing_ok=True)
    assert "\r" not in capsys.readouterr().err  # where there is no terminal


#: Damage to an archive on its way.
BAD_DOWNLOADS = {
    "one byte": lambda x: x[: len(x) // 2] + bytes([x[len(x) // 2] ^ 1]) + x[len(x) // 2 + 1 :],
    "cut off": lambda x: x[: len(x) // 2],
    "html": lambda x: b"<html>Please log in to the network</html>",
}


@pytest.mark.parametrize("how", [*BAD_DOWNLOADS, "malicious", "breaks off", "no http", "missing", "down"])
def test_a_failed_download_is_refused_unread_with_the_remedy_and_the_next_good_archive_taken(
    cifar, server, tmp_path, how
):
    root, touched = tmp_path / "data", tmp_path / "touched"
    if how in BAD_DOWNLOADS:
        cifar.served.write_bytes(BAD_DOWNLOADS[how](cifar.archive))
    elif how == "malicious":
        evil = pickle.dumps(Touch(touched), protocol=2)
        cifar.served.write_bytes(tar_gz({f"{cifar.folder}/{file}": evil for file in cifar.files}))
    elif how == "missing":
        cifar.served.unlink()
    elif how == "down":
        server.shutdown()
        server.server_close()
    else:
        server.fault = how
    with pytest.raises(ConnectionError, match=r"put http://.* there yourself") as e:
        load_datasets("cifar10", str(root), 1)
    assert cifar.published.url in str(e.value)
    assert cifar.published.tgz_md5 in str(e.value)
    assert not touched.exists()
    assert not list(root.iterdir())
    server.fault = None
    by_hand = how in ("missing", "down")
    (root / cifar.published.filename if by_hand else cifar.served).write_bytes(cifar.archive)
    assert load_datasets("cifar10", str(root), 1).train.labels.tolist() == cifar.labels["train"]


def test_an_extracted_file_that_was_tampered_with_is_never_unpickled(cifar, tmp_path):
    load_datasets("cifar10", str(tmp_path), 1)
    (tmp_path / cifar.published.filename).unlink()
    cifar.served.unlink()
    for file in ("data_batch_3", "test_batch", "batches.meta"):
        (tmp_path / cifar.folder / file).write_bytes(pickle.dumps(Touch(tmp_path / "touched")))
        with pytest.raises(ConnectionError, match=rf"\(damaged: {file}\), and cifar10 could not be downloaded"):
            load_datasets("cifar10", str(tmp_path), 1)
        assert not (tmp_path / "touched").exists()
        (tmp_path / cifar.folder / file).write_bytes(cifar.files[file])


def test_what_a_folder_lacks_is_downloaded(cifar, tmp_path):
    folder = cifar.write(tmp_path)
    for file in cifar.files:
        (folder / file).write_bytes(b"x")
        assert load_datasets("cifar10", str(folder), 1).test.labels.tolist() == cifar.labels["test"]
        assert (folder / file).read_bytes() == cifar.files[file]
        archive = tmp_path / cifar.published.filename
        assert archive.read_bytes() == cifar.archive
        archive.unlink()
