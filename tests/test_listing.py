"""Paths in arrays, archives as folders, one process that lists."""

import gzip
import io
import os
import random
import re
import shutil
import subprocess
import tarfile
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from conftest import TRAINING, Start, assert_same_state, read_log, tiny
from PIL import Image

import common
import dino_mc
from common import IMAGE_SUFFIXES, Paths, Samples, list_images

ALONE = common.Process(0, 1, torch.device("cpu"), None)


def walked(root):
    """The slow obvious listing."""
    found = [os.path.join(folder, name) for folder, _, names in os.walk(root) for name in names]
    return sorted(path for path in found if os.path.splitext(path)[1].lower() in IMAGE_SUFFIXES
                  and "/." not in path[len(str(root)) :])


def write_tree(root, seed=0, depth=0, letters=b"ab.- 0~Z\xc3\xa4\xff"):
    """Folders and files of names of any bytes, some longer than 100 with their folders."""
    r = random.Random(f"{seed} {depth}")
    root.mkdir(parents=True)
    for i in range(5):
        name = os.fsdecode(bytes(r.choices(letters, k=r.choice([1, 2, 3, 60]))))
        if name.strip(".") and not (root / name).exists():
            if r.random() < 0.6 and depth < 3:
                write_tree(root / name, f"{seed} {i}", depth + 1)
            (root / (name + ".png")).write_bytes(os.fsencode(name) * i)


def list_tar(folder, **more):
    return list_images(folder, archives=folder.parent / "out" / "archives.npz", **more)


def write_tar(path, *members):
    """Members: (name, bytes), or (name, type, target)."""
    path.parent.mkdir(exist_ok=True, parents=True)
    with tarfile.open(path, "w") as tar:
        for name, *rest in members:
            info = tarfile.TarInfo(name)
            if isinstance(rest[0], bytes) and len(rest) == 1:
                info.size = len(rest[0])
                tar.addfile(info, io.BytesIO(rest[0]))
            else:
                info.type, info.linkname = rest
                tar.addfile(info)


# --------------------------------------------------------------------------------------------------
# Order and names
# --------------------------------------------------------------------------------------------------


def test_paths_are_those_of_a_sorted_walk(tmp_path):
    for seed in range(3):
        root = tmp_path / str(seed)
        write_tree(root, seed)
        expected, paths = walked(root), list_images(root)
        assert len(expected) > 30 and list(paths) == expected == list(Paths.of(expected))
        chosen = np.array([7, 0, -1, 7])
        assert list(paths[chosen]) == [expected[i] for i in chosen] and list(paths[3:5]) == expected[3:5]
        with pytest.raises(IndexError):
            paths[len(paths)]


@pytest.mark.parametrize("kind", ["python ustar", "python gnu", "python pax", "v7", "oldgnu", "ustar", "pax"])
def test_archives_of_every_kind_are_listed_and_read_as_their_folder(tmp_path, kind):
    write_tree(tmp_path / "tree")
    (tmp_path / "data").mkdir()
    archive, formats = tmp_path / "data/tree.tar", {"ustar": 0, "gnu": 1, "pax": 2}
    if kind.startswith("python"):
        with tarfile.open(archive, "w", format=formats[kind.split()[1]]) as tar:
            tar.add(tmp_path / "tree", arcname="")
    elif not shutil.which("tar"):
        pytest.skip("needs tar")
    else:
        subprocess.run(["tar", f"--format={kind}", "-cf", archive, "-C", tmp_path / "tree", "."])
        with tarfile.open(archive) as tar:  # v7 leaves out names that are too long
            kept = {member.name.removeprefix("./") for member in tar}
    root, expected = str(tmp_path / "tree"), walked(tmp_path / "tree")
    if kind == "v7":
        expected = [path for path in expected if os.path.relpath(path, root) in kept]
    paths = list_tar(tmp_path / "data")
    assert len(paths) > 20 and max(map(len, expected)) > len(root) + 100 * (kind != "v7")
    assert list(paths) == [f"{archive}{path[len(root):]}" for path in expected]
    for path, file in zip(paths, expected, strict=True):
        with path.open() as member:
            assert member.read() == Path(file).read_bytes()


def test_members_that_tar_would_write_count(tmp_path):
    """The last of a name, links to members; no hidden files, no output of runs, nothing outside."""
    write_tar(tmp_path / "data/sub/a.TAR", ("./a/1.png", b"old"), ("a//./1.png", b"new"),
              ("/b/2.png", b"two"), ("a/hard.png", tarfile.LNKTYPE, "a/1.png"),
              ("c/soft.png", tarfile.SYMTYPE, "../b/chain"),
              ("b/chain", tarfile.SYMTYPE, "2.png"), ("gone.png", b"x"), ("gone.png", tarfile.DIRTYPE, ""),
              ("../../up.png", b"x"), ("a/.b/h.png", b"x"), ("@eaDir/e.png", b"x"), ("run/log.jsonl", b""),
              ("run/deep/r.png", b"x"), ("lost.png", tarfile.SYMTYPE, "/etc/passwd"), ("x.txt", b"x"))
    (tmp_path / "data/z.png").touch()
    os.mkfifo(tmp_path / "data/pipe.tar")
    paths, found = list_tar(tmp_path / "data"), {}
    assert paths[-1] == str(tmp_path / "data/z.png")
    for path in paths[:-1]:
        name = os.path.relpath(path, tmp_path / "data/sub/a.TAR")
        try:
            found[name] = path.open().read()
        except ValueError as error:
            found[name] = str(error)
    assert found == {"a/1.png": b"new", "a/hard.png": b"new", "b/2.png": b"two", "c/soft.png": b"two",
                     "lost.png": "a link to no file of its archive: make that with tar --dereference"}
    assert list(list_images(tmp_path / "data")) == [str(tmp_path / "data/z.png")]  # evaluations


def test_size_in_base_256(tmp_path):
    write_tar(tmp_path / "data/a.tar", ("a.png", b"abc"), ("b.png", b"de"))
    data = bytearray((tmp_path / "data/a.tar").read_bytes())
    data[124:136] = b"\x80" + (3).to_bytes(11, "big")
    data[148:156] = b"%06o\0 " % (sum(data[:148]) + sum(data[156:512]) + 256)
    (tmp_path / "data/a.tar").write_bytes(data)
    assert [path.open().read() for path in list_tar(tmp_path / "data")] == [b"abc", b"de"]


def test_an_archive_replaced_between_two_listings_is_opened_again(tmp_path):
    for data in (b"old", b"new"):
        write_tar(tmp_path / "other.tar", ("a.png", data))
        (tmp_path / "data").mkdir(exist_ok=True)
        os.replace(tmp_path / "other.tar", tmp_path / "data/a.tar")
        assert [path.open().read() for path in list_tar(tmp_path / "data")] == [data]


def test_places_are_folders_in_files_and_archives(tmp_path):
    """Against a dict of lists, with names that sort before a slash; windows too."""
    r, names = random.Random(0), set()
    for _ in range(60):
        folders = r.choices(["a", "a-1", "a.b", "c"], k=r.randint(1, 3))
        names.add("/".join([*folders, f"{r.randint(0, 9)}.png"]))
    write_tar(tmp_path / "data/a.tar", *((name, b"") for name in sorted(names, key=hash)))
    samples = Samples(list_tar(tmp_path / "data"))
    args = Namespace(mode="tp", data_path="x")
    for tiles in (None, 8):
        samples.tile_size = tiles
        samples.sizes = np.array([(r.choice([8, 16]), r.choice([8, 20])) for _ in names], np.int32)
        samples.ends = (-(-samples.sizes // 8)).prod(1, dtype=np.int64).cumsum()
        expected = {}
        for index in range(len(samples)):
            image, *window = samples.place(index)
            expected.setdefault((os.path.dirname(samples.paths[image]), *window), []).append(index)
        groups = dino_mc.group_locations(samples, args)
        assert list(groups) == [expected[key] for key in sorted(expected)] and len(groups) == len(expected)


# --------------------------------------------------------------------------------------------------
# Archives that are broken, change, or are listed again
# --------------------------------------------------------------------------------------------------


def refused(capsys, folder):
    with pytest.raises(SystemExit):
        list_tar(folder)
    error = capsys.readouterr().err
    assert error.startswith(f"error: --data_path {folder}/a.tar: ") and error.count("\n") == 1
    return error


def test_a_truncated_archive_is_refused_wherever_it_ends(tmp_path, capsys):
    members = [(f"{i}.png", bytes(600)) for i in range(3)] + [("d" * 120 + ".png", b"x")]
    write_tar(tmp_path / "data/a.tar", *members)
    archive = tmp_path / "data/a.tar"
    data = archive.read_bytes()
    end = data.index(b"x" + bytes(511)) + 512
    for length in {0, 100, 512, 700, *range(512, end + 1, 512)}:
        archive.write_bytes(data[:length])
        assert "truncated" in refused(capsys, tmp_path / "data")
    archive.write_bytes(data[: end + 512])  # one block of zeros is enough
    assert len(list_tar(tmp_path / "data")) == 4
    for place in (3, 1536 + 130, 3 * 1536 + 5):  # in the first header, in the second, in that of a long name
        archive.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        words = "damaged at byte" if place > 512 else "no tar archive"
        assert words in refused(capsys, tmp_path / "data")


OF_FILE = b"0" + bytes(100) + b"ustar"


@pytest.mark.parametrize("make, words", [
    (gzip.compress, "compressed archive: unpack it to a plain one (gzip -dc"),
    (lambda data: data + data, "joined by cat do: join them by tar -A"),
    (lambda data: data.replace(OF_FILE, b"S" + OF_FILE[1:]), "sparse"),
    (lambda data: data.replace(OF_FILE, b"x" + OF_FILE[1:]), "damaged at byte 0"),
    (lambda data: data[:124] + b"77777777777\0" + data[136:], "truncated or damaged: a.png is incomplete"),
    (lambda data: data[:124] + b"\x80" + b"\xff" * 11 + data[136:], "truncated or damaged: a.png"),
    (lambda data: data[:124] + b"-0000000001\0" + data[136:], "damaged at byte 0")])
def test_archives_that_are_refused(tmp_path, capsys, make, words):
    write_tar(tmp_path / "data/a.tar", ("a.png", b"x"))
    data = bytearray(make((tmp_path / "data/a.tar").read_bytes()))
    if data[:2] != b"\x1f\x8b":
        data[148:156] = b"%06o\0 " % (sum(data[:148]) + sum(data[156:512]) + 256)
    (tmp_path / "data/a.tar").write_bytes(data)
    assert words in refused(capsys, tmp_path / "data")


def test_compressed_archives_beside_images_are_left_out_with_a_warning(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/b.tar.gz").touch()
    with pytest.raises(SystemExit):
        list_tar(tmp_path / "data")
    assert "no image in it" in (error := capsys.readouterr().err) and "b.tar.gz: compressed archives" in error
    (tmp_path / "data/a.png").touch()
    assert len(list_tar(tmp_path / "data")) == 1
    assert capsys.readouterr().err.startswith(f"warning: {tmp_path}/data/b.tar.gz: compressed archives are")


def test_listings_are_kept_and_nothing_of_damaged_ones(tmp_path, monkeypatch):
    for name in ("a", "b"):
        write_tar(tmp_path / f"data/{name}.tar", (f"{name}/1.png", b"x"), ("2.png", b"y"))
    expected, kept = list(list_tar(tmp_path / "data")), tmp_path / "out/archives.npz"
    own, calls, list_members = kept.read_bytes(), [], common._list_members
    monkeypatch.setattr(common, "_list_members", lambda *args: calls.append(1) or list_members(*args))

    def again():
        calls.clear()
        assert list(list_tar(tmp_path / "data")) == expected and kept.read_bytes() == own
        return len(calls)

    assert again() == 0
    turned = bytearray(own)
    turned[own.index(b"NUMPY", own.index(b"rows.npy")) + 140] ^= 1  # in the numbers
    for data in (own[:-30], b"", b"x" * 99, own.replace(b"rows", b"rowz"), bytes(turned)):
        kept.write_bytes(data)
        assert again() == 2
    stat = os.stat(tmp_path / "data/a.tar")
    os.utime(tmp_path / "data/a.tar", ns=(0, stat.st_mtime_ns + 1))
    assert list(list_tar(tmp_path / "data")) == expected and len(calls) == 3


def test_an_archive_of_nothing_but_long_names_is_refused(tmp_path, capsys):
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 512
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.tar").write_bytes((info.tobuf(tarfile.GNU_FORMAT) + bytes(512)) * 5000)
    assert "a.tar: truncated or damaged: " in refused(capsys, tmp_path / "data")


# --------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------


def test_every_reader_reads_members_as_files(tmp_path):
    array, folder = np.random.default_rng(0).integers(0, 255, (70, 90, 3), np.uint8), tmp_path / "files"
    folder.mkdir()
    for name in ("a.png", "b.jpg", "c.jp2", "d.bmp"):
        Image.fromarray(array).save(folder / name)
    np.save(folder / "e.npy", array.astype("f4"))
    tiled = {"compression": "zlib", "tile": (16, 16)}
    for name, more in (("f", {}), ("g", tiled), ("h", {"planarconfig": 2})):
        pixels = array.transpose(2, 0, 1) if name == "h" else array
        tifffile.imwrite(folder / f"{name}.tif", pixels.astype("u2"), photometric="rgb", **more)
    whole = (folder / "f.tif").read_bytes()
    (folder / "i.tif").write_bytes(whole[:-9])  # what follows in the archive is not its pixels
    (folder / "j.png").write_bytes(b"")
    (tmp_path / "data").mkdir()
    with tarfile.open(tmp_path / "data/a.tar", "w") as tar:
        tar.add(folder, arcname="x")
    for path, member in zip(list_images(folder), list_tar(tmp_path / "data"), strict=True):
        for window in (None, (20, 30, 40, 50)):
            try:
                expected = common.read_image(path, window=window)
            except common.UnreadableImageError:
                assert path[-5:] in ("i.tif", "j.png")
                with pytest.raises(common.UnreadableImageError, match="a.tar/x/[ij]"):
                    common.read_image(member, window=window)
            else:
                assert torch.equal(common.read_image(member, window=window), expected)
                assert common.image_size(member) == (70, 90)


def pack(folder, data):
    """An archive of a folder, as the README makes it."""
    data.mkdir()
    with tarfile.open(data / "train.tar", "w") as tar:
        for path in sorted(Path(folder).rglob("*")):
            tar.add(path, arcname=f"./{path.relative_to(folder)}", recursive=False)
    return data


@pytest.mark.parametrize("script", TRAINING)
def test_training_on_an_archive_equals_that_on_its_folder(run, scenes, tmp_path, script):
    """Also where it stops, and resumes with workers."""
    data, saved = pack(scenes / "train", tmp_path / "data"), []
    for source, steps in ((scenes / "train", [(3, 0)]), (data, [(1, 0), (3, 2)])):
        out = tmp_path / f"of_{source.name}"
        for stop, workers in steps:
            run(script, "--data_path", source, "--output_dir", out, *tiny(script), "--max_steps", stop,
                "--num_workers", workers)
        saved.append(torch.load(out / "checkpoint.pth", weights_only=True))
    assert_same_state(*saved)
    assert saved[0]["step"] == 3 and (out / "archives.npz").exists()


def test_places_in_an_archive(run, scenes, tmp_path):
    data, saved = pack(scenes / "locations", tmp_path / "data"), []
    for source in (scenes / "locations", data):
        flags = tiny("dino_mc", "--mode", "tp", "--max_steps", "2", "--tile_size", "40")
        out = tmp_path / f"of_{source.name}"
        run("dino_mc", "--data_path", source, "--output_dir", out, *flags)
        saved.append(torch.load(out / "checkpoint.pth", weights_only=True))
    assert_same_state(*saved)


def test_a_damaged_member_is_one_unreadable_image(run, scenes, tmp_path, capsys, monkeypatch):
    data = pack(scenes / "train", tmp_path / "data")
    with open(data / "train.tar", "r+b") as file:
        paths = list_tar(data)
        file.seek(paths[4].at)
        file.write(b"\0" * paths[4].size)
    monkeypatch.setattr(common.Run, "__init__", (lambda init: lambda run, *a, images, **more: init(
        run, *a, images=1000, **more))(common.Run.__init__))  # else it is over 1 %
    run("mhcl", "--data_path", data, "--output_dir", tmp_path / "run", *tiny("mhcl"))
    assert read_log(tmp_path / "run")[-1]["unreadable"] == 1
    assert capsys.readouterr().err.count(f"unreadable, another image taken: {paths[4]}: ") == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_an_archive_that_changes_under_a_run_ends_it(run, scenes, tmp_path, capfd, monkeypatch, workers):
    data, restore = pack(scenes / "train", tmp_path / "data"), common.Run.restore
    monkeypatch.setattr(common.Run, "restore", lambda *args, **more: (os.utime(data / "train.tar", (9, 9)),
                                                                       restore(*args, **more)))
    with pytest.raises(SystemExit) as end:
        flags = tiny("mhcl", "--num_workers", str(workers))
        run("mhcl", "--data_path", data, "--output_dir", tmp_path / "run", *flags)
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error")]
    assert end.value.code == 1
    assert errors == [f"error: {data}/train.tar: changed since it was listed: start again"]


# --------------------------------------------------------------------------------------------------
# Memory and processes
# --------------------------------------------------------------------------------------------------


class Touch(torch.utils.data.Dataset):
    """Looks at paths; gives the worker's own memory in kB."""

    def __init__(self, paths):
        self.paths = paths

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, key):
        assert self.paths[key[1]].endswith(".jpg")
        if key[1] % 1000:
            return 0
        text = Path("/proc/self/smaps_rollup").read_text()
        return sum(map(int, re.findall(r"^Private_\w+: +(\d+) kB", text, re.M)))


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="needs Linux's /proc")
def test_memory_of_a_worker_does_not_grow_with_the_names_it_reads():
    names, growth = [f"/data/region_{i // 1000}/scene_{i:06d}.jpg" for i in range(200_000)], []
    for paths in (Paths.of(names), names):
        sampler = common.StepSampler(len(paths), 500, 1, ALONE, seed=0, start_step=0, end_step=100)
        memory = [batch for batch, _ in common.build_loader(Touch(paths), sampler, 1, ALONE.device)]
        memory = [int(value) for batch in memory for value in batch if value]
        growth.append((memory[-1] - memory[0]) / 1024)
    # MB, to which a copy of a large process adds its own; the list shows that it can be seen.
    assert growth[0] < 8 and growth[1] > growth[0] + 4, growth
    paths = Paths.of(names)
    assert paths.text.nbytes + paths.rows.nbytes == 32 * len(paths) + sum(map(len, names))


def only_main_lists(*lacking):
    """In the last process listing is an error, and it does not see the paths `lacking`."""
    if os.environ["RANK"] == "1":
        for name in ("list_images", "_walk", "_list_members", "measure_pixels", "image_size"):
            setattr(common, name, lambda *args, **more: pytest.fail("listed"))
        if lacking:  # on a machine of its own
            os.environ["LOCAL_RANK"] = "0"
            exists, stat = os.path.lexists, os.stat
            gone = lambda path: path in lacking  # noqa: E731
            os.path.lexists = lambda path: not gone(path) and exists(path)
            os.path.isdir = lambda path: not gone(path) and stat(path).st_mode & 0o40000 > 0
            os.path.exists = lambda path: not gone(path) and exists(path)


def test_one_process_lists_for_two(scenes, tmp_path):
    data = pack(scenes / "train", tmp_path / "data")
    shutil.copy(next((scenes / "train").rglob("*.png")), data / "z.png")
    flags = ["--data_path", data, *tiny("mhcl", "--max_steps", "2", "--tile_size", "40")]
    Start(tmp_path / "a", "mhcl", *flags, "--output_dir", tmp_path / "run", processes=2,
          prepare=(only_main_lists,)).finish()
    for i, lost in enumerate(map(str, (data, data / "z.png", data / "train.tar"))):
        start = Start(tmp_path / f"lost{i}", "mhcl", *flags, "--output_dir", tmp_path / "other", processes=2,
                      prepare=(only_main_lists, lost))
        codes, text = start.wait()
        assert codes == [2, 2] and len(re.findall("^error", text, re.M)) == len(text.splitlines()) == 1
        assert f"--data_path {lost}: not there on" in text and not (tmp_path / "other/log.jsonl").exists()
    (data / "train.tar").write_bytes(b"\x1f\x8b")
    codes, text = Start(tmp_path / "b", "mhcl", *flags, "--output_dir", tmp_path / "run", processes=2).wait()
    assert codes == [2, 2] and len(text.splitlines()) == 1 and "train.tar: a compressed archive" in text


def test_what_changes_between_listing_and_training_ends_the_start(tmp_path, scenes, capsys):
    """An archive of the same size, whose images lie elsewhere now."""
    data = pack(scenes / "train", tmp_path / "data")
    paths = common.list_images(data, archives=tmp_path / "archives.npz")
    common.check_there(ALONE, paths, data)
    os.utime(data / "train.tar", ns=(1, 1))
    with pytest.raises(SystemExit):
        common.check_there(ALONE, paths, data)
    assert "train.tar: changed since it was listed: start again" in capsys.readouterr().err


def test_files_that_wait_for_ever_and_headers_that_promise_too_much(tmp_path, capsys):
    """A pipe is no archive and no image; a .npy is as large as its member, whatever its header says."""
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(common.UnreadableImageError, match="not a regular file"):
        common.read_image(tmp_path / "pipe.png")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "x.tar").symlink_to(tmp_path / "pipe.png")
    with pytest.raises(SystemExit):
        common.list_images(tmp_path / "data", archives=tmp_path / "archives.npz")
    assert "x.tar: not a regular file" in capsys.readouterr().err
    (tmp_path / "data" / "x.tar").unlink()
    array, text = np.arange(5 * 7 * 3, dtype="f4").reshape(5, 7, 3), io.BytesIO()
    np.save(tmp_path / "good.npy", np.asfortranarray(array))
    np.lib.format.write_array_header_1_0(
        text, {"descr": "|u1", "fortran_order": False, "shape": (30_000, 30_000, 3)})
    (tmp_path / "large.npy").write_bytes(text.getvalue())
    with tarfile.open(tmp_path / "data" / "y.tar", "w") as archive:
        for name in ("good.npy", "large.npy"):
            archive.add(tmp_path / name, name)
    good, large = common.list_images(tmp_path / "data", archives=tmp_path / "archives.npz")
    assert torch.equal(common.read_image(good), torch.from_numpy(array).permute(2, 0, 1))
    with pytest.raises(common.UnreadableImageError, match="its numbers lie beyond its end"):
        common.image_size(large)
