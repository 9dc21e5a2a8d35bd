"""Which images of a folder are windows, of whom, in which recording and order; every image is accounted for."""

import hashlib
import itertools
import os
import random
import uuid
import warnings

import pytest
from helpers import message, picture, write_image, write_set

from mdlib.data.files import WindowFile, find_windows, parse_users, scan
from mdlib.data.windows import load_windows
from mdlib.utils import DataError


def digest(*key):
    return hashlib.md5(str(key).encode()).hexdigest()


def touch(root, *paths):
    """Empty files: finding windows does not read them."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    return root


def named(root, name, users=(1, 2), windows=range(1, 41), recordings=(1,), extension="png"):
    """Files in ID_k folders with the name that `name(user, recording, window)` gives."""
    for user in users:
        touch(root, *(f"ID_{user}/{name(user, r, k)}.{extension}" for r in recordings for k in windows))
    return root


def quiet(function, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return function(*args, **options)


def by_user(files):
    """Recordings of each user, each with its numbers."""
    found: dict = {}
    for f in files:
        found.setdefault(f.user, {}).setdefault(f.recording, []).append(f.number)
    return found


# ---- folders and names as mdlib writes them


def test_windows_are_ordered_as_numbers(tmp_path):
    root = write_set(tmp_path / "set", users=(10, 9), numbers=(2, 10, 1))
    found = find_windows(root)
    assert [(f.user, f.number) for f in found] == [(9, 1), (9, 2), (9, 10), (10, 1), (10, 2), (10, 10)]
    assert found[0] == WindowFile("ID_9/ID9_case1_1_Doppler1.png", 9, "", "ID9_case1_1_Doppler", 1)


NAMES = {
    "0012": ("", 12),
    "ID7_case1_1_Doppler102": ("ID7_case1_1_Doppler", 102),
    "ID_7_w3_jet": ("ID_7_w_jet", 3),
    "Doppler7_256x256": ("Doppler_256x256", 7),
    "win0005_77GHz": ("win_77GHz", 5),
}


@pytest.mark.parametrize("stem", NAMES)
def test_one_window_of_each_user(tmp_path, stem):
    first = find_windows(touch(tmp_path, f"ID_7/{stem}.PNG", f"ID_8/{stem}.PNG"))[0]
    assert (first.recording, first.number) == NAMES[stem]


def test_bad_folders(tmp_path):
    root = write_set(tmp_path / "set")
    assert "no such folder" in message(find_windows, tmp_path / "absent")
    assert "folder that holds ID_1" in message(find_windows, root / "ID_1")
    assert "1 user only (ID_1)" in message(find_windows, write_set(tmp_path / "one", users=(1,)))
    assert "choose number, name, time" in message(find_windows, root, order="date")
    touch(root, "runs/demo/generated/ID_1/w1.png", "runs/demo/generated/generation.json")
    assert "generated: generated windows inside a folder of real ones" in message(find_windows, root)


def test_one_user_in_two_folders(tmp_path):
    root = write_set(tmp_path / "set")
    write_image(root / "ID_02" / "w1.png", picture(2, 1))
    text = message(find_windows, root)
    assert "ID_02" in text and "ID_2" in text and "user 2" in text


def test_generated_folders(tmp_path):
    """As `generate` writes them: one or more seeds, one or more windows of each user."""
    for seeds, n in (((0,), 1), ((0,), 4), ((0, 7), 3), (range(5), 2)):
        names = lambda u, seed, k: f"ID{u}_generated_seed{seed}_{k}"
        root = named(tmp_path / f"{len(seeds)}-{n}", names, recordings=seeds, windows=range(n))
        touch(root, "manifest.csv", "generation.json")
        expected = {f"ID2_generated_seed{seed}_": [*range(n)] for seed in seeds}
        assert by_user(quiet(find_windows, root))[2] == expected


def test_parse_users():
    assert parse_users("1,2,5-8") == [1, 2, 5, 6, 7, 8]
    assert parse_users(" 3 - 4, 3,1") == [3, 4, 1]
    for text in ("", "1,,2", "a", "5-2", "1;2", "-3"):
        assert "1,2,5-8" in message(parse_users, text)


# ---- the window's number among the numbers of a name

COUNTED = {
    "the hash of an upload": lambda u, r, k: f"ID{u}_case1_1_Doppler{k}_jpg.rf.{digest(u, k)}",
    "a short hash": lambda u, r, k: f"{digest(u, k)[:8]}_Doppler{k}",
    "a uuid": lambda u, r, k: f"Doppler{k}-{uuid.UUID(digest(u, k))}",
    "a random number": lambda u, r, k: f"Doppler{k}_{random.Random(u * 99 + k).randrange(10**6)}",
    "a size": lambda u, r, k: f"ID{u}_Doppler{k}_256x256",
    "a carrier frequency": lambda u, r, k: f"win{k:04d}_77GHz",
    "a compact date": lambda u, r, k: f"20240105_{k:06d}",
    "a time of its own": lambda u, r, k: f"w{k}_2024-01-05T12.{30 + k // 20}.{k % 20 * 3:02d}",
    "a start sample": lambda u, r, k: f"Doppler{k}_start{k * 384}",
    "the user's number": lambda u, r, k: f"{k}_ID{u}",
    "other scripts": lambda u, r, k: f"用户{u}_窗口{k}",
    "a folder for each window": lambda u, r, k: f"{k:03d}/spectrogram",
}


@pytest.mark.parametrize("kind", COUNTED)
def test_the_number_that_varies_is_the_windows(tmp_path, kind):
    """Gaps stay: they may separate the parts of a split."""
    windows = [k for k in range(1, 60) if k not in (7, 20, 21, 22)]
    found = by_user(quiet(find_windows, named(tmp_path, COUNTED[kind], windows=windows)))
    assert [[*recordings.values()] for recordings in found.values()] == [[windows]] * 2, "one recording, in order"


ORDERED = {
    "a date and a time": lambda u, r, k: f"2024-01-05_12-{30 + k // 20}-{k % 20 * 3:02d}",
    "a compact date and time": lambda u, r, k: f"20240105{12 + k // 20}30{k % 20 * 3:02d}",
    "milliseconds": lambda u, r, k: f"ID{u}_20240105T123007{k * 7:03d}",
    "a time alone": lambda u, r, k: f"ID{u} 12-{30 + k // 20}-{k % 20 * 3:02d}",
    "seconds since 1970": lambda u, r, k: f"{1704457807 + 2 * k}",
    "a start sample": lambda u, r, k: f"start_{k * 128}",
}


@pytest.mark.parametrize("kind", ORDERED)
def test_times_give_the_order_and_no_distance(tmp_path, kind):
    found = quiet(find_windows, named(tmp_path, ORDERED[kind]))
    wanted = [f"{ORDERED[kind](1, 1, k)}.png" for k in range(1, 41)]
    assert [f.path.split("/")[1] for f in found if f.user == 1] == wanted
    assert by_user(found)[1].popitem()[1] == [*range(40)], "one recording, neighbours one apart"


SEVERAL = {
    "recording first": lambda u, r, k: f"ID{u}_case1_{r}_Doppler{k}",
    "recording last": lambda u, r, k: f"w{k:03d}_{r}",
    "a folder": lambda u, r, k: f"day{r}/Doppler{k}",
    "a time of recording": lambda u, r, k: f"2024-01-05_12-3{r}-07_{k:04d}",
    "a day": lambda u, r, k: f"2024-01-0{r}_{k:02d}",
    "a word": lambda u, r, k: f"{'xabc'[r]}_{k}",
    "a uuid of the recording": lambda u, r, k: f"{uuid.UUID(digest(u, r))}_{k}",
    "a start sample": lambda u, r, k: f"rec{r}_win{k}_start{384 * k}",
    "a random number": lambda u, r, k: f"rec{r}_win{k}_{random.Random(u * 999 + r * 99 + k).randrange(10**6)}",
    "the hash of an upload": lambda u, r, k: f"trial{r}_{k}_png.rf.{digest(u, r, k)}",
}


@pytest.mark.parametrize("kind", SEVERAL)
@pytest.mark.parametrize("windows", [40, 5])
def test_recordings(tmp_path, kind, windows):
    root = named(tmp_path, SEVERAL[kind], windows=range(1, windows + 1), recordings=(1, 2, 3))
    found = quiet(find_windows, root)
    assert list(by_user(found)[2].values()) == [[*range(1, windows + 1)]] * 3
    wanted = {f"ID_2/{SEVERAL[kind](2, r, k)}.png": r for r in (1, 2, 3) for k in range(1, windows + 1)}
    assert len({(f.recording, wanted[f.path]) for f in found if f.user == 2}) == 3


def test_many_short_recordings(tmp_path):
    """More recordings than windows in each."""
    root = named(tmp_path, lambda u, r, k: f"take{r:02d}_win{k}", windows=range(3), recordings=range(20))
    assert [*by_user(find_windows(root))[1].values()] == [[0, 1, 2]] * 20
    root = named(tmp_path / "days", lambda u, r, k: f"day{r}/{k}", windows=range(3), recordings=range(20))
    assert [*by_user(find_windows(root))[1].values()] == [[0, 1, 2]] * 20


@pytest.mark.parametrize("twin", ["ID_1/w5.webp", "ID_1/w05.png", "ID_1/w005.jpg"])
def test_one_window_in_two_files_is_named(tmp_path, twin):
    root = named(tmp_path / "set", lambda u, r, k: f"w{k}")
    text = message(find_windows, touch(root, twin))
    assert twin in text and "ID_1/w5.png" in text and "the same window" in text and "delete" in text


def test_uploads_of_one_window_are_named(tmp_path):
    root = named(tmp_path, lambda u, a, k: f"w{k}_png.rf.{digest(u, a, k)}", recordings=(1, 2))
    assert "the same window (and 79 more pairs)" in message(find_windows, root)


NAMELESS = {
    "md5": lambda u, r, k: digest(u, k),
    "uuid": lambda u, r, k: str(uuid.UUID(digest(u, k))),
    "random numbers": lambda u, r, k: f"ID{u}_{random.Random(u * 99 + k).randrange(10**6, 10**9)}",
    "random numbers of a recording": lambda u, r, k: f"{k % 2}_{random.Random(u * 99 + k).randrange(10**9)}",
    "letters": lambda u, r, k: f"ID{u}_{chr(96 + k)}",
    "ids of letters": lambda u, r, k: "".join(random.Random(u * 99 + k).choices("aBcD0123", k=9)),
}


@pytest.mark.parametrize("kind", NAMELESS)
def test_names_without_a_window_number_need_an_order(tmp_path, kind):
    root = named(tmp_path, NAMELESS[kind], windows=range(1, 21), extension="jpg")
    text = message(find_windows, root)
    assert "no window numbers in names such as ID_1/" in text and "--order name" in text and "order=name" in text

    found = quiet(find_windows, root, order="name")
    mine = [f for f in found if f.user == 1]
    assert {f.recording for f in found} == {""} and [f.number for f in mine] == [*range(20)]
    assert kind != "letters" or [f.path for f in mine] == sorted(f.path for f in mine)

    for user, k in itertools.product((1, 2), range(1, 21)):
        time = 1_700_000_000 + 60 * (20 - k) + user
        os.utime(root / f"ID_{user}" / f"{NAMELESS[kind](user, 1, k)}.jpg", (time, time))
    found = quiet(find_windows, root, order="time")
    wanted = [f"ID_1/{NAMELESS[kind](1, 1, k)}.jpg" for k in range(20, 0, -1)]
    assert [f.path for f in found if f.user == 1] == wanted


def test_orders_keep_folders_apart_and_count_as_people_do(tmp_path):
    root = named(tmp_path, lambda u, r, k: f"day{r}/x{k}", windows=(2, 10, 1), recordings=(1, 2))
    found = find_windows(root, order="name")
    assert by_user(found)[1] == {"day1": [0, 1, 2], "day2": [0, 1, 2]}
    assert [f.path for f in found[:3]] == ["ID_1/day1/x1.png", "ID_1/day1/x2.png", "ID_1/day1/x10.png"]
    for path in root.rglob("*.png"):
        os.utime(path, (10**9, 10**9))
    assert "different times" in message(find_windows, root, order="time")


def test_the_order_reaches_the_set(tmp_path):
    for user, (k, letter) in itertools.product((1, 2), enumerate("cab")):
        write_image(tmp_path / f"ID_{user}" / f"{letter}.png", picture(user, k), "grey")
    assert "order" in message(load_windows, tmp_path)
    windows = load_windows(tmp_path, size=32, order="name")
    assert [f.path[-5] for f in windows.files] == ["a", "b", "c"] * 2
    assert windows.images[0].tolist() == [picture(1, 1).tolist()]


def test_an_image_unlike_the_others_is_pointed_out(tmp_path):
    root = touch(named(tmp_path, lambda u, r, k: f"w{k}"), "ID_1/overview.png")
    with pytest.warns(UserWarning, match=r"1 image with an unusual name.*ID_1/overview\.png") as caught:
        found = find_windows(root)
    assert len(found) == 81 and len(caught) == 1


FOLDERS = "ID_1 ID5 id-06 ID-7 user_8 subject9 person10 P12 S03 Sub14 sub-15 16 用户17".split() + ["ID 2", "User 11"]


@pytest.mark.parametrize("above", ["", "正常 步态/", "train/a;b,c'd/"])
def test_names_of_user_folders(tmp_path, above):
    touch(tmp_path, *(f"{above}{folder}/w{k}.png" for folder in FOLDERS for k in (1, 2)))
    found = quiet(find_windows, tmp_path)
    users = {folder: int("".join(filter(str.isdigit, folder))) for folder in FOLDERS}
    assert {f.path.removeprefix(above).split("/")[0]: f.user for f in found} == users
    assert {f.condition for f in found} == {above.replace("train/", "").strip("/")} and {f.part for f in found} == {""}
    assert len(found) == 2 * len(FOLDERS)


@pytest.mark.parametrize("folder", ["ID_4 (copy)", "ID_06_left", "2024", "my notes", "图片", "P3/S4"])
def test_images_that_are_of_no_user_are_reported(tmp_path, folder):
    root = touch(write_set(tmp_path), *(f"{folder}/w{k}.png" for k in range(20)))
    reason = "not in one user folder like ID_3"
    with pytest.warns(UserWarning) as caught:
        assert len(find_windows(root)) == 6
    line = f"26 images found, 6 used; ignored: {folder}/ (20 images: {reason})"
    assert [str(w.message) for w in caught] == [f"{root}: {line}"]
    assert scan(root).ignored == ((f"{folder}/", 20, reason),) and scan(root).found == 26
    assert "no user folders" in message(find_windows, touch(tmp_path / folder, "x.png"))


def test_a_report_stays_one_line_of_a_readable_length(tmp_path):
    touch(write_set(tmp_path), *(f"notes{k}/x.png" for k in range(200)))
    with pytest.warns(UserWarning, match=r"206 images found, 6 used; .*, 192 more \(192 images\)$"):
        find_windows(tmp_path)
    assert sum(n for _, n, _ in scan(tmp_path).ignored) == 200


def test_folders_above_and_below_users(tmp_path):
    touch(tmp_path, *(f"S1/ID_{u}/cam2/w{k}.png" for u in (1, 2) for k in range(3)))
    found = quiet(find_windows, tmp_path)
    assert {(f.condition, f.user, f.recording) for f in found} == {("S1", 1, "cam2/w"), ("S1", 2, "cam2/w")}


@pytest.mark.parametrize("extension", ["bmp", "tif", "webp"])
def test_bmp_tif_and_webp_are_images(tmp_path, extension):
    options = {"lossless": True} if extension == "webp" else {}
    for user in (1, 2):
        write_image(tmp_path / f"ID_{user}" / f"w1.{extension}", picture(user, 1), **options)
    windows = load_windows(tmp_path, size=32)
    assert windows.images[1, 0].tolist() == picture(2, 1).tolist() and windows.colormap == "jet"


def test_junk_is_skipped_at_every_level(tmp_path):
    root = write_set(tmp_path / "set", users=(1, 2))
    for folder in ("", "ID_1/", "ID_1/day2/"):
        touch(root, *(f"{folder}{name}/ID_1/._x.jpg" for name in ("__MACOSX", "@eaDir", ".hidden")))
        touch(root, *(f"{folder}{name}/x.jpg" for name in ("__macosx", "@eaDir", ".ipynb_checkpoints")))
        touch(root, *(f"{folder}{name}" for name in ("Thumbs.db", "desktop.ini", ".DS_Store", "._y.png", ".z.jpg")))
    assert len(quiet(find_windows, root)) == 6 and scan(root).found == 6


# ---- folders that are split already


PARTS = [
    "train val test",
    "Train TEST",
    "training validation testing",
    "Train_set valid test-set",
    "trainset test_data",
]


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("layout", ["{}/ID_{}", "{}/normal/ID_{}", "normal/{}/ID_{}", "ID_{1}/{0}"])
def test_folders_of_a_split_are_parts(tmp_path, parts, layout):
    for start, folder in enumerate(parts.split()):
        for user in (1, 2):
            where = layout.format(folder, user)
            touch(tmp_path, *(f"{where}/ID{user}_Doppler{k}.png" for k in range(10 * start, 10 * start + 8)))
    found = quiet(find_windows, tmp_path)
    assert {f.condition for f in found} == {"normal" if "normal" in layout else ""}
    assert {(f.user, f.recording) for f in found} == {(1, "ID1_Doppler"), (2, "ID2_Doppler")}
    for f in found:
        assert f.part in ("train", "val", "test") and f"/{f.part}" in f"/{f.path}".lower()
        assert f.number == int(f.path.split("Doppler")[1][:-4])


def test_times_are_ordered_across_parts(tmp_path):
    for user, k in itertools.product((1, 2), range(20)):
        touch(tmp_path, f"{'test' if k % 4 == 3 else 'train'}/ID_{user}/20240105_1230{k:02d}.png")
    found = [f for f in find_windows(tmp_path) if f.user == 1]
    assert [f.number for f in found] == [*range(20)] and [f.part for f in found[:4]] == ["train"] * 3 + ["test"]


def test_numbers_that_start_again_in_each_part_keep_the_parts_apart(tmp_path):
    for part, n in (("train", 20), ("val", 5), ("test", 7)):
        touch(tmp_path, *(f"{part}/ID_{user}/w{k:03d}.png" for user in (1, 2) for k in range(n)))
    found = quiet(find_windows, tmp_path)
    assert by_user(found)[1] == {"train/w": [*range(20)], "val/w": [*range(5)], "test/w": [*range(7)]}
    assert all(f.recording.startswith(f.part) for f in found)


def test_a_window_in_two_parts_is_named(tmp_path):
    for part, numbers in (("train", range(20)), ("test", range(19, 30))):
        touch(tmp_path, *(f"{part}/ID_{user}/w{k:03d}.png" for user in (1, 2) for k in numbers))
    text = message(find_windows, tmp_path)
    assert "train/ID_1/w019.png" in text and "test/ID_1/w019.png" in text and "the same window" in text


def test_one_part_alone_splits_nothing(tmp_path):
    root = touch(tmp_path, *(f"train/ID_{user}/w{k}.png" for user in (1, 2) for k in range(4)), "test/w1.png")
    with pytest.warns(UserWarning, match=r"9 images found, 8 used; ignored: test/ \(1 image: not in one user folder"):
        assert {(f.part, f.condition) for f in find_windows(root)} == {("", "")}


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_links(tmp_path):
    touch(tmp_path, *(f"elsewhere/{u}/w{k}.png" for u in (1, 2) for k in (1, 2)))
    root = tmp_path / "set"
    root.mkdir()
    for user in (1, 2):
        (root / f"ID_{user}").symlink_to(tmp_path / "elsewhere" / str(user), target_is_directory=True)
    (tmp_path / "elsewhere" / "1" / "back").symlink_to(root, target_is_directory=True)
    assert len(quiet(find_windows, root)) == 4, "a link that leads back ends there"
    (tmp_path / "elsewhere" / "2" / "w3.png").symlink_to(tmp_path / "gone.png")
    with pytest.warns(UserWarning, match=r"ID_2/ \(1 image: a broken link"):
        assert len(find_windows(root)) == 4


@pytest.mark.parametrize("denied", ["ID_2", "set"])
def test_folders_without_rights(tmp_path, monkeypatch, denied):
    root, listing = write_set(tmp_path / "set"), os.scandir

    def refuse(path):
        if str(path).endswith(denied):
            raise PermissionError(13, "Permission denied", str(path))
        return listing(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert f"{denied}: cannot be read (Permission denied)" in message(find_windows, root)


# ---- anything


def odd_layout(root, seed):
    """A folder of up to some hundred images without a plan; returns how many there are."""
    rng = random.Random(seed)
    above = rng.choice([[""], ["normal", "bag"], ["train", "val", "test"], ["train", "ID_9"], ["a/b", "c"], ["1", "2"]])
    folders = "ID_1 ID_2 ID_02 ID2 user_3 7 P4 S5 sub-06 ID_4(copy) anna notes 2024-01-05 试验 人8 __MACOSX .git a.png"
    users = rng.sample(folders.split(), 5)
    inside = rng.choice([[""], ["", "day2"], ["cam1", "cam2"], ["test"], ["ID_1"], ["aug"], [digest(seed)]])
    names = rng.sample([*COUNTED.values(), *ORDERED.values(), *SEVERAL.values(), *NAMELESS.values()], 2)
    paths = set()
    for _ in range(rng.randrange(1, 200)):
        user, number = rng.choice(users), rng.randrange(1, 25)
        stem = rng.choice(names)(rng.choice([1, 2]), rng.randrange(1, 4), number)
        extension = rng.choice(["png", "JPG", "jpeg", "webp", "tif"] if rng.random() < 0.1 else ["png"])
        mark = rng.choice([" (1)", " - Copy", "_aug2", "x"]) if rng.random() < 0.02 else ""
        path = "/".join(filter(None, [rng.choice(above), user, rng.choice(inside), f"{stem}{mark}.{extension}"]))
        paths.add(path)
    if rng.random() < 0.3:
        paths |= {"cover.png", "notes/x.bmp"} | ({"ID_1/new\nline.png"} if os.name != "nt" else set())
    touch(root, *paths)
    return sum("__MACOSX" not in path and ".git" not in path for path in paths)


@pytest.mark.parametrize("seed", range(300))
def test_odd_layouts_end_in_one_line_and_lose_no_image(tmp_path, seed):
    found = odd_layout(tmp_path, seed)
    for order in ("number", "name", "time"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                files = find_windows(tmp_path, order=order)
            except DataError as error:
                assert "\n" not in str(error) and str(tmp_path) in str(error)
                continue
        result = scan(tmp_path, order=order)
        assert result.found == found == len(files) + sum(n for _, n, _ in result.ignored)
        assert len({(f.user, f.condition, f.recording, f.number) for f in files}) == len(files)
        assert all((tmp_path / f.path).is_file() for f in files) and len({f.path for f in files}) == len(files)
        lines = [str(w.message) for w in caught]
        assert not any("\n" in line for line in lines) and len(lines) <= 2
        assert bool(result.ignored) == any(
            f"{found} images found, {len(files)} used; ignored" in line for line in lines
        )
