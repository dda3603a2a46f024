"""The page for labelling in a real browser: by keys, by touch, and with hostile names."""

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect

from vissl_lite.cli import main
from vissl_lite.encoders.encoder import build_encoder
from vissl_lite.encoders.folder import save_encoder
from vissl_lite.report.label_page import LabelImage, LabelledNeighbor, write_label_page
from vissl_lite.transfer.classification.discovery import find_labels
from vissl_lite.transfer.classification.options import DEFAULT_LABELS
from vissl_lite.transfer.sources.reading_log import ReadingLog

pytestmark = pytest.mark.slow

COLORS = ["red", "green", "blue", "orange", "purple", "gray"]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images to label; one labelled neighbor suggests fern for the first three, else moss."""
    folder = tmp_path_factory.mktemp("label")
    for color in COLORS:
        Image.new("RGB", (48, 32), color).save(folder / f"{color}.png")
    images = []
    for number, color in enumerate(COLORS):
        other = folder / f"{COLORS[number // 3]}.png"
        neighbor = LabelledNeighbor(str(other), ["fern", "moss"][number // 3], 0.8)
        images.append(LabelImage(str(folder / f"{color}.png"), [neighbor]))
    write_label_page(folder / "label.html", images, ["fern", "moss", "alga"], "Plants")
    return folder / "label.html"


@pytest.fixture
def opened(page: Page, file: Path) -> Page:
    show(page, file)
    return page


def show(page: Page, file: Path) -> None:
    """Open a page for labelling, and wait until it takes keys."""
    page.goto(file.as_uri())
    expect(page.locator("#filters button").first).to_be_visible()


def press(page: Page, *keys: str) -> None:
    for key in keys:
        page.keyboard.press(key)


def classes_in(table: Path) -> dict[str, str]:
    """The class of each image in a table, as ``finetune`` reads it."""
    found = find_labels(table, DEFAULT_LABELS, ReadingLog(str(table)))
    return {image.path: name for image in found.images for name in image.names}


def saved(page: Page, to: Path, button: str = "#save") -> str:
    """The file that a button saves, as it is on the disk."""
    with page.expect_download() as download:
        page.click(button)
    assert download.value.suggested_filename in ("labels.csv", "not_usable.csv")
    download.value.save_as(to)
    return to.read_bytes().decode("utf-8", "surrogateescape")


def lines(file: Path, *rows: tuple[str, str], header: str = "path,class") -> str:
    return "".join(
        f"{row}\r\n" for row in (header, *(f"{file.parent}/{a}.png,{b}" for a, b in rows))
    )


def test_images_are_labelled_by_keys_and_finetune_reads_the_csv(
    opened: Page, file: Path, tmp_path: Path
) -> None:
    counter, place = opened.locator("#counter"), opened.locator("#place")
    expect(counter).to_have_text("0 of 6 labelled")
    expect(opened.locator("#accept")).to_contain_text("fern 1 of 1 neighbors")
    press(opened, "Enter", "2", "s", "x", "3", "n")
    opened.keyboard.type("  sea weed ")
    press(opened, "Enter")
    expect(counter).to_have_text("4 of 6 labelled, 1 skipped, 1 not usable")
    expect(opened.locator("#message")).to_contain_text("1 skipped")
    press(opened, "Control+z", "Backspace")
    expect(place).to_have_text("5 / 6")
    expect(counter).to_have_text("2 of 6 labelled, 1 skipped, 1 not usable")
    expect(opened.locator("#classes button")).to_have_count(3)  # the new class is gone, too
    press(opened, "1", "4")  # there is no fourth class
    expect(place).to_have_text("6 / 6")
    assert saved(opened, tmp_path / "labels.csv") == lines(
        file, ("red", "fern"), ("green", "moss"), ("purple", "fern")
    )
    unusable = saved(opened, tmp_path / "not_usable.csv", "#save-unusable")
    assert unusable == lines(file, ("orange", "1"), header="path,not_usable")
    read = classes_in(tmp_path / "labels.csv")
    assert {Path(path).stem: label for path, label in read.items()} == {
        "green": "moss", "purple": "fern", "red": "fern"
    }  # fmt: skip


def test_select_label_finetune_select_again(page: Page, photos: Path, tmp_path: Path) -> None:
    """The whole way through the command line and the page."""
    encoder = tmp_path / "encoder"
    save_encoder(build_encoder("test_resnet", 32), encoder, {})
    select = ["select", "--encoder", encoder, "--data", photos, "--budget", 12, "--out"]
    assert main([str(word) for word in (*select, tmp_path / "first")]) == 0
    show(page, tmp_path / "first" / "label.html")
    for name in ("cat", "dog"):
        press(page, "n")
        page.keyboard.type(name)
        press(page, "Enter")
    press(page, *"1212121212")
    expect(page.locator("#counter")).to_have_text("12 of 12 labelled")
    table = tmp_path / "labels.csv"
    saved(page, table)
    tuned = ["finetune", "--encoder", encoder, "--data", table, "--epochs", 2, "--out"]
    assert main([str(word) for word in (*tuned, tmp_path / "tuned")]) == 0
    later = (tmp_path / "second", "--labelled", table, "--model", tmp_path / "tuned")
    assert main([str(word) for word in (*select, *later)]) == 0
    results = [json.loads((tmp_path / n / "results.json").read_text()) for n in ("first", "second")]
    assert [one["labelled"] for one in results] == [0, 12]
    chosen = [(tmp_path / n / "selected.csv").read_text() for n in ("first", "second")]
    paths = [{row["path"] for row in csv.DictReader(text.splitlines())} for text in chosen]
    assert len(paths[0] | paths[1]) == 24


def test_progress_is_there_again_after_a_reload(opened: Page) -> None:
    press(opened, "n")
    opened.keyboard.type("lichen")
    press(opened, "Enter", "s", "2")
    opened.reload()
    expect(opened.locator("#counter")).to_have_text("2 of 6 labelled, 1 skipped")
    expect(opened.locator("#place")).to_have_text("4 / 6")
    expect(opened.locator("#classes button").last).to_contain_text("lichen")
    press(opened, "Backspace", "Backspace", "Backspace")
    expect(opened.locator("#counter")).to_have_text("0 of 6 labelled")


def test_an_added_class_keeps_its_key_when_its_last_image_gets_another_one(
    opened: Page, file: Path, tmp_path: Path
) -> None:
    for name in ("cat", "dog", "bird"):  # keys 4, 5 and 6
        press(opened, "n")
        opened.keyboard.type(name)
        press(opened, "Enter")
    press(opened, *["ArrowLeft"] * 3, "5")  # the only cat is a dog
    buttons = ["1fern", "2moss", "3alga", "4cat", "5dog2", "6bird1"]
    expect(opened.locator("#classes button")).to_have_text(buttons)
    press(opened, "5")
    opened.reload()
    buttons[4] = "5dog3"
    expect(opened.locator("#classes button")).to_have_text(buttons)
    assert saved(opened, tmp_path / "labels.csv") == lines(
        file, ("red", "dog"), ("green", "dog"), ("blue", "bird"), ("orange", "dog")
    )
    press(opened, *["Backspace"] * 3)  # up to the change that added bird, which goes with it
    expect(opened.locator("#classes button")).to_have_text([*buttons[:3], "4cat1", "5dog1"])


def test_images_labelled_on_the_page_are_neighbors_of_those_after_them(
    page: Page, tmp_path: Path
) -> None:
    """The first round, in which nothing else is labelled."""
    paths = [str(tmp_path / f"{color}.png") for color in COLORS[:4]]
    for path in paths:
        Image.new("RGB", (48, 32), Path(path).stem).save(path)
    similarities = {2: {0: 0.9, 1: 0.7}, 3: {0: 0.74, 1: 0.7, 2: 0.7}}
    images = [
        LabelImage(path, similar=[(paths[i], one) for i, one in similarities.get(n, {}).items()])
        for n, path in enumerate(paths)
    ]
    write_label_page(tmp_path / "label.html", images, ["fern", "moss"], "Plants")
    show(page, tmp_path / "label.html")
    accept, shown = page.locator("#accept"), page.locator("#neighbors img")
    expect(accept).to_have_text("No suggestionEnter")
    above = page.locator("#classes").bounding_box()
    press(page, "Enter", "1", "2")
    expect(page.locator("#place")).to_have_text("3 / 4")
    expect(accept).to_contain_text("fern 1 of 2 neighbors")  # the nearer one
    expect(shown).to_have_count(2)
    expect(page.locator("#classes .suggested")).to_contain_text("fern")
    assert page.locator("#classes").bounding_box() == above  # no button moves below a finger
    press(page, "2")
    expect(accept).to_contain_text("moss 2 of 3 neighbors")  # which outvote a nearer one
    press(page, "ArrowLeft", "x")  # has no class any more
    expect(accept).to_contain_text("fern 1 of 2 neighbors")
    page.reload()
    expect(accept).to_contain_text("fern 1 of 2 neighbors")
    press(page, "Enter")
    expect(page.locator("#state")).to_have_text("fern")
    expect(page.locator("#counter")).to_have_text("3 of 4 labelled, 1 not usable")


def test_the_nearest_neighbors_of_earlier_rounds_and_of_the_page_vote_together(
    page: Page, tmp_path: Path
) -> None:
    paths = [str(tmp_path / f"{color}.png") for color in COLORS]
    for path in paths:
        Image.new("RGB", (48, 32), Path(path).stem).save(path)
    before = [LabelledNeighbor(paths[i], "moss", 0.6 - i / 100) for i in range(5)]
    image = LabelImage(paths[5], before, [(paths[0], 0.9)])
    write_label_page(tmp_path / "label.html", [LabelImage(paths[0]), image], ["fern"], "Plants")
    show(page, tmp_path / "label.html")
    press(page, "1")
    expect(page.locator("#accept")).to_contain_text("fern 1 of 5 neighbors")
    cards = page.locator("#neighbors > div")
    expect(cards).to_have_text(["fern0.90", "moss0.60", "moss0.59", "moss0.58", "moss0.57"])
    expect(cards.first).to_have_attribute("title", "fern, similarity 0.90, image 1 of this page")


def test_typing_a_name_is_not_taken_for_shortcuts(opened: Page) -> None:
    press(opened, "n")
    opened.keyboard.type("s12x")
    press(opened, "Backspace", "ArrowLeft")
    expect(opened.locator("#counter")).to_have_text("0 of 6 labelled")
    expect(opened.locator("#place")).to_have_text("1 / 6")
    expect(opened.locator("#new-class")).to_have_value("s12")
    press(opened, "Escape", "s")
    expect(opened.locator("#new-class")).to_have_value("")
    expect(opened.locator("#counter")).to_have_text("0 of 6 labelled, 1 skipped")


def test_a_class_that_is_there_is_found_by_its_name_in_any_case(opened: Page) -> None:
    opened.fill("#new-class", "MO")
    expect(opened.locator("#classes button:visible")).to_have_text(["2moss"])
    opened.fill("#new-class", "Moss ")
    expect(opened.locator("#add")).to_have_text("Use moss")
    opened.click("#add")
    expect(opened.locator("#classes button")).to_have_count(3)
    expect(opened.locator("#strip button").first).to_have_text("✓ moss")


def test_the_enter_key_takes_the_suggestion_after_a_click_and_never_changes_a_label(
    opened: Page,
) -> None:
    opened.click("#classes button:nth-child(3)")
    press(opened, "Enter")
    expect(opened.locator("#strip button span")).to_have_text(
        ["✓ alga", "✓ fern", "· 3", "· 4", "· 5", "· 6"]
    )
    press(opened, "ArrowLeft", "ArrowLeft", "Enter")
    expect(opened.locator("#state")).to_have_text("alga")
    opened.locator("#skip").focus()  # by the Tab key: a button that has the focus is pressed
    press(opened, "Enter")
    expect(opened.locator("#strip button span").first).to_have_text("↷ 1")


def test_a_key_that_is_held_labels_one_image(opened: Page) -> None:
    for _ in range(3):
        opened.keyboard.down("1")
    opened.keyboard.up("1")
    expect(opened.locator("#counter")).to_have_text("1 of 6 labelled")


def test_skipped_images_alone_are_gone_through(opened: Page) -> None:
    press(opened, "s", "1", "s", "1")
    opened.get_by_role("button", name="skipped 2").click()
    expect(opened.locator("#strip button:visible")).to_have_count(2)
    expect(opened.locator("#place")).to_have_text("1 / 6")
    press(opened, "ArrowRight")
    expect(opened.locator("#place")).to_have_text("3 / 6")
    press(opened, "2", "2")
    expect(opened.locator("#counter")).to_have_text("4 of 6 labelled")
    expect(opened.locator("#strip button:visible")).to_have_count(6)


def test_an_image_of_the_strip_is_opened_and_its_label_changed(opened: Page) -> None:
    press(opened, "1", "1", "1")
    opened.locator("#strip button").nth(1).click()
    expect(opened.locator("#picture")).to_have_attribute("alt", "Image 2 of 6: label0/green.png")
    press(opened, "x")
    expect(opened.locator("#place")).to_have_text("4 / 6")
    expect(opened.locator("#counter")).to_have_text("2 of 6 labelled, 1 not usable")


def test_saved_files_are_loaded_in_another_browser(
    opened: Page, browser: Browser, file: Path, tmp_path: Path
) -> None:
    press(opened, "1", "x", "n")
    opened.keyboard.type('sea, "weed"')
    press(opened, "Enter")
    first = saved(opened, tmp_path / "labels.csv")
    saved(opened, tmp_path / "not_usable.csv", "#save-unusable")
    with (tmp_path / "labels.csv").open("a") as more:
        more.write("/elsewhere.png,fern\r\n")
    other = browser.new_page()
    show(other, file)
    expect(other.locator("#counter")).to_have_text("0 of 6 labelled")
    other.set_input_files("#load", tmp_path / "labels.csv")
    expect(other.locator("#message")).to_contain_text("labels.csv: 2 read, 1 not on this page")
    other.set_input_files("#load", tmp_path / "not_usable.csv")
    expect(other.locator("#counter")).to_have_text("2 of 6 labelled, 1 not usable")
    assert saved(other, tmp_path / "again.csv") == first
    press(other, "Backspace", "Backspace")
    expect(other.locator("#counter")).to_have_text("0 of 6 labelled")
    # as a spreadsheet may write it
    (tmp_path / "sheet.csv").write_text(f"\ufeffPath;Label\n{file.parent}/blue.png;'moss'\n")
    other.set_input_files("#load", tmp_path / "sheet.csv")
    expect(other.locator("#strip button span").nth(2)).to_have_text("✓ 'moss'")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    other.set_input_files("#load", tmp_path / "other.csv")
    expect(other.locator("#message")).to_contain_text("no columns path and class")
    other.context.close()


def test_labels_of_earlier_rounds_are_in_the_csv(page: Page, tmp_path: Path) -> None:
    old, new = str(tmp_path / "old.png"), str(tmp_path / "new.png")
    for path in (old, new):
        Image.new("RGB", (8, 8), "red").save(path)
    file, before = tmp_path / "label.html", [(old, "moss"), (new, "stone")]
    write_label_page(file, [LabelImage(new)], [], "Plants", before)
    show(page, file)
    press(page, "n")
    page.keyboard.type("fern")
    press(page, "Enter")
    rows = lines(file, ("old", "moss"), ("new", "fern"))
    assert saved(page, tmp_path / "labels.csv") == rows
    expect(page.locator("#message")).to_contain_text("Labels: 1 and 1 from before")


def test_groups_are_a_column_of_the_csv(page: Page, tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{name}.png") for name in ("old", "new", "other")]
    for path in paths:
        Image.new("RGB", (8, 8), "red").save(path)
    groups = {paths[0]: "p1", paths[1]: "p,2"}
    file, images = tmp_path / "label.html", [LabelImage(path) for path in paths[1:]]
    write_label_page(file, images, ["moss"], "Plants", [(paths[0], "moss")], groups)
    show(page, file)
    press(page, "1", "1")
    assert saved(page, tmp_path / "labels.csv") == "".join(
        f"{row}\r\n"
        for row in ("path,class,group", f"{paths[0]},moss,p1", f'{paths[1]},moss,"p,2"',
                    f"{paths[2]},moss,")
    )  # fmt: skip


@pytest.fixture
def phone(browser: Browser) -> Iterator[Page]:
    context = browser.new_context(
        viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True
    )
    yield context.new_page()
    context.close()


def test_a_phone_is_enough(phone: Page, file: Path, tmp_path: Path) -> None:
    show(phone, file)
    phone.tap("#accept")
    phone.tap("#classes button:nth-child(3)")
    phone.tap("#skip")
    phone.tap("#unusable")
    phone.tap("#undo")
    phone.fill("#new-class", "lichen on a very old and weathered stone")
    phone.tap("#add")
    expect(phone.locator("#counter")).to_contain_text("3 of 6 labelled")
    assert phone.evaluate("document.documentElement.scrollWidth") == 360
    small = phone.evaluate("""() => [...document.querySelectorAll("button, input, .file label")]
      .filter((one) => one.checkVisibility() && !one.matches(".file input"))
      .filter((one) => {
        const {width, height} = one.getBoundingClientRect()
        return width < 44 || height < 44
      }).map((one) => one.outerHTML)""")
    assert small == []
    assert phone.locator("kbd:visible").count() == 0
    # the image stays in sight while one scrolls to the last class
    phone.evaluate("scrollTo(0, 400)")
    assert phone.locator("#picture").bounding_box()["y"] >= 0
    saved(phone, tmp_path / "labels.csv")
    assert len(classes_in(tmp_path / "labels.csv")) == 3


def test_a_hundred_images_are_labelled_on_a_phone(phone: Page, tmp_path: Path) -> None:
    noise = np.random.default_rng(0)
    paths = [str(tmp_path / f"{number}.jpg") for number in range(100)]
    for path in paths:
        Image.fromarray(noise.integers(0, 256, (120, 160, 3), np.uint8)).save(path)
    classes, file = [f"class {number}" for number in range(12)], tmp_path / "label.html"
    write_label_page(file, [LabelImage(path) for path in paths], classes, "Many")
    show(phone, file)
    for number in range(100):
        phone.tap(f"#classes button:nth-child({number % 12 + 1})")
        if number == 60:  # in the middle of the work, the phone is put away
            phone.reload()
            expect(phone.locator("#place")).to_have_text("62 / 100")
        assert phone.evaluate("""() => {
          const strip = document.getElementById("strip").getBoundingClientRect()
          const current = document.querySelector("#strip [aria-current]").getBoundingClientRect()
          return strip.left <= current.left && current.right <= strip.right
        }""")
    expect(phone.locator("#counter")).to_have_text("100 of 100 labelled")
    saved(phone, tmp_path / "labels.csv")
    found = classes_in(tmp_path / "labels.csv")
    assert found == {path: classes[number % 12] for number, path in enumerate(paths)}


def test_hostile_names_are_shown_as_text_and_written_as_they_are(
    page: Page, tmp_path: Path
) -> None:
    names = ["a,b.png", 'a "quoted" name.png', "two\nlines.png", "semi;colon\t.png",
             "naïve 😀.png", "</script><b>.png", "<img src=x onerror=fail()>.png",
             os.fsdecode(b"\xff\xe9.png"), " $& .png"]  # fmt: skip
    (tmp_path / "<").mkdir()  # where one of the images is
    classes = ["a,b", '"quoted"', "<img src=x onerror=fail()>", "x|y;z", "two\nlines", "naïve 😀",
               "</script>", "1.0", "=1+1"]  # fmt: skip
    paths = [str(tmp_path / name) for name in names]
    for number, path in enumerate(paths):
        Image.new("RGB", (8, 8), (20 * number, 9, 9)).save(path, "PNG")
    images = [LabelImage(path, [LabelledNeighbor(paths[0], classes[6], 0.5)]) for path in paths]
    write_label_page(tmp_path / "label.html", images, classes, "<b>&amp; \udcff")
    show(page, tmp_path / "label.html")
    expect(page.locator("h1")).to_have_text("<b>&amp; ?")
    for number in range(9):
        expect(page.locator("#classes span").nth(number)).to_have_text(classes[number])
        press(page, str(number + 1))
    expect(page.locator("#counter")).to_have_text("9 of 9 labelled")
    assert page.locator("#name").get_attribute("title") is not None
    text = saved(page, tmp_path / "labels.csv")
    assert f'"{paths[0]}","a,b"\r\n"{tmp_path}/a ""quoted"" name.png","""quoted"""\r\n' in text
    assert classes_in(tmp_path / "labels.csv") == dict(zip(paths, classes, strict=True))
    press(page, *["Backspace"] * 9)
    page.set_input_files("#load", tmp_path / "labels.csv")
    expect(page.locator("#counter")).to_have_text("9 of 9 labelled")
    assert saved(page, tmp_path / "again.csv") == text


def test_a_browser_that_keeps_nothing_says_so(page: Page, file: Path, tmp_path: Path) -> None:
    page.add_init_script(
        "Object.defineProperty(window, 'indexedDB', {get() { throw new Error('denied') }})"
    )
    show(page, file)
    expect(page.locator("#no-storage")).to_be_visible()
    press(page, "1")
    expect(page.locator("#counter")).to_have_text("1 of 6 labelled")
    asked: list[str] = []
    page.on("dialog", lambda dialog: (asked.append(dialog.type), dialog.accept()))
    page.reload()
    assert asked == ["beforeunload"]
    expect(page.locator("#counter")).to_have_text("0 of 6 labelled")


def test_progress_that_cannot_be_read_is_not_replaced(opened: Page, file: Path) -> None:
    press(opened, "1", "1")
    expect(opened.locator("#counter")).to_have_text("2 of 6 labelled")
    fails = opened.context.new_page()
    fails.add_init_script("IDBObjectStore.prototype.get = () => { throw new Error('busy') }")
    opened.goto("about:blank")
    show(fails, file)
    expect(fails.locator("#no-storage")).to_be_visible()
    press(fails, "3")
    show(opened, file)
    expect(opened.locator("#counter")).to_have_text("2 of 6 labelled")


def test_the_same_page_in_two_windows_is_one(opened: Page, file: Path) -> None:
    other = opened.context.new_page()
    show(other, file)
    press(other, "1")
    expect(opened.locator("#counter")).to_have_text("1 of 6 labelled")
    press(opened, "2")
    expect(other.locator("#counter")).to_have_text("2 of 6 labelled")
