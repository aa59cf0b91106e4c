"""Own items: what files are read or refused, and that every plan can be carried out, by a reader of its own."""

import csv
import functools
import json
from collections import Counter

import jax
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import evaluate

SHIPPED = ROOT / "checkpoints" / "search_distill_cpu.pkl"
EXAMPLE = ROOT / "tests" / "data" / "freight.csv"
BOX = (5870, 2330, 2200)
HEADER = "Item_Name,Length,Width,Height,Quantity\n"
PLAIN = HEADER + 'Carton,600,400,300,3\n"Sofa, red",2200,950,850,1\n'


def items_of(path) -> Counter:
    """(name, length, width, height) -> quantity."""
    with open(path, newline="") as file:
        return Counter({tuple(row[:4]): int(row[4]) for row in list(csv.reader(file))[1:]})


def boxes_of(path) -> dict[str, list[tuple]]:
    """File -> (name, x, y, z, length, width, height) of each item of a plan, in the order of loading."""
    with open(path, newline="") as file:
        rows = json.load(file)["items"] if path.suffix == ".json" else list(csv.DictReader(file))
    boxes = {}
    for row in rows:
        place = (int(row[key]) for key in ("x", "y", "z", "length", "width", "height"))
        boxes.setdefault(row.get("file", ""), []).append((row["name"], *place))
        assert int(row["item"]) == len(boxes[row.get("file", "")])
    return boxes


def check(boxes: list[tuple], items: Counter, container=BOX) -> float:
    """The utilisation of a plan that can be carried out, by integers alone."""
    meet = lambda a, b, axis: a[1 + axis] < b[1 + axis] + b[4 + axis] and b[1 + axis] < a[1 + axis] + a[4 + axis]
    before = lambda a, b, axis: a[1 + axis] + a[4 + axis] <= b[1 + axis]
    for i, box in enumerate(boxes):
        assert all(0 <= box[1 + k] and box[1 + k] + box[4 + k] <= container[k] for k in range(3)), box
        for earlier in boxes[:i]:
            assert not all(meet(box, earlier, axis) for axis in range(3)), (box, earlier)
            is_under = before(box, earlier, 2) and meet(box, earlier, 0) and meet(box, earlier, 1)
            is_behind = before(box, earlier, 0) and meet(box, earlier, 1) and meet(box, earlier, 2)
            assert not is_under and not is_behind, (box, earlier)
    used = Counter((name, *map(str, size)) for name, _, _, _, *size in boxes)
    assert used <= items
    return sum(x * y * z for *_, x, y, z in boxes) / (container[0] * container[1] * container[2])


def run(tmp_path, *words) -> list[dict]:
    """The rows of an evaluation's JSON."""
    path = tmp_path / "scores.json"
    assert evaluate.main([*map(str, words), f"json={path}"]) == 0
    return json.loads(path.read_text())["rows"]


def test_the_example_is_packed_and_drawn(tmp_path, capsys):
    plan, picture = tmp_path / "plan.csv", tmp_path / "packed.png"
    (row,) = run(tmp_path, SHIPPED, f"instances={EXAMPLE}", f"plan={plan}", f"render={picture}")
    (boxes,) = boxes_of(plan).values()
    items = items_of(EXAMPLE)
    assert row["utilisation"] == pytest.approx(check(boxes, items), abs=1e-12) and row["utilisation"] > 0.6
    rest = items - Counter((name, *map(str, size)) for name, _, _, _, *size in boxes)
    assert row["left_out"] == {name: count for (name, *_), count in rest.items()} and row["file"] == "freight.csv"
    assert row["packed_items"] == len(boxes) == len(row["plan"]) and row["items"] == items.total()
    assert row["sizes"]["max_num_items"] == items.total() + 1
    first, second = capsys.readouterr().out.splitlines()
    assert first.split() == ["policy", "file", "utilisation", "items", "left", "out"]
    assert f" {row['utilisation']:.2%} " in second and f" {len(boxes)} of {items.total()} " in second
    assert all(f"{count} x {name}" in second for name, count in row["left_out"].items())
    with Image.open(picture) as image:
        assert image.format == "PNG" and len(set(image.convert("L").get_flattened_data())) > 20


def test_the_readmes_example_is_the_committed_file():
    file, readme = json.loads((ROOT / "tests/results/freight.json").read_text()), (ROOT / "README.md").read_text()
    assert f"```text\n{evaluate.own_table(file['rows'])}\n```" in readme
    assert file["command"].removesuffix(" json=freight.json") + "    # own items\n" in readme
    items = items_of(EXAMPLE)
    for row in file["rows"]:
        boxes = [(item["name"], *(item[key] for key in evaluate.PLACE)) for item in row["plan"]]
        assert row["utilisation"] == pytest.approx(check(boxes, items), abs=1e-12)
    volume = sum(int(x) * int(y) * int(z) * n for (_, x, y, z), n in items.items()) / (BOX[0] * BOX[1] * BOX[2])
    assert f"the {items.total()} items" in readme and f"together {100 * volume:.0f} % of the container" in readme


@pytest.mark.slow
def test_two_files_by_several_policies(tmp_path, capsys):
    """In a container of their own; the better plan of each file is written."""
    big, small, plan = tmp_path / "big.csv", tmp_path / "small.csv", tmp_path / "plan.json"
    big.write_text(HEADER + "Crate,600,500,500,4\nTube,1000,200,200,3\n")
    small.write_text(HEADER + "Crate,500,400,400,2\nCube,300,300,300,1\n")
    words = f"instances=[{big},{small}]", "container=1000,1000,900", "max_num_ems=12", "obs_num_ems=12"
    policies = "greedy,search,one_ply,beam,random,largest_first,lookahead"
    few = "n=2", "beam_width=2", "num_simulations=2", "leaf_value=network"
    rows = run(tmp_path, SHIPPED, *words, *few, f"policy={policies}", f"plan={plan}", f"render={tmp_path}/a.png")
    assert [(row["policy"], row["file"]) for row in rows] == [
        (policy, file) for policy in policies.split(",") for file in ("big.csv", "small.csv")
    ]
    scores, found = json.loads((tmp_path / "scores.json").read_text()), boxes_of(plan)
    assert scores["container"] == json.loads(plan.read_text())["container"] == [1000, 1000, 900]
    assert scores["instances"] == [str(big), str(small)] and list(found) == ["big.csv", "small.csv"]
    for path in (big, small):
        best = max(row["utilisation"] for row in rows if row["file"] == path.name)
        used = check(found[path.name], items_of(path), (1000, 1000, 900))
        assert used == pytest.approx(best, abs=1e-12)
    packed = {(row["policy"], row["file"]): row["utilisation"] for row in rows}
    for policy in "search", "one_ply", "beam":
        assert all(packed[policy, path.name] >= packed["greedy", path.name] for path in (big, small))
    assert all(row["left_out"] == {} for row in rows if row["file"] == "small.csv" and row["policy"] != "random")
    assert capsys.readouterr().out.count("nothing") >= 4


def test_an_instance_is_that_of_jumanjis_generator(tmp_path):
    """For each of several files, whatever is beside it; and Jumanji's own files are read."""
    with evaluate.importing_jumanji():
        from jumanji.environments import BinPack
        from jumanji.environments.packing.bin_pack.generator import CSVGenerator, RandomGenerator, save_instance_to_csv
    save_instance_to_csv(RandomGenerator(20, 40, split_num_same_items=2)(jax.random.PRNGKey(3)), tmp_path / "v2.csv")
    (tmp_path / "plain.csv").write_text(PLAIN)
    paths = [tmp_path / "plain.csv", tmp_path / "v2.csv"]
    files = {path.name: evaluate.read_items(str(path), BOX) for path in paths}
    assert [len(items) for items in files.values()] == [4, 19]
    keys = evaluate.evaluation_keys(0, 2)
    sizes = evaluate.Sizes(**evaluate.sizes_for(files, evaluate.Config()))
    generator = evaluate.make_own_generator(files, keys, sizes, BOX)
    env = evaluate.without_network(sizes).script.make_env(sizes, generator)
    for path, key in zip(paths, keys, strict=True):
        jumanji = BinPack(CSVGenerator(str(path), sizes.max_num_ems), obs_num_ems=sizes.obs_num_ems)
        expected = jax.jit(jumanji.reset)(key)[1].observation
        n = len(files[path.name])
        found = jax.jit(env.reset)(jax.random.fold_in(key, sizes.max_decisions))[1].observation
        assert not found.items_mask[n:].any() and not found.action_mask[:, n:].any()
        found = found._replace(
            items=jax.tree.map(lambda x: x[:n], found.items),
            items_mask=found.items_mask[:n],
            items_placed=found.items_placed[:n],
            action_mask=found.action_mask[:, :n],
        )
        found = type(expected)(*found[:-1])  # Without the blocks.
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), found, expected)


def lines(*rows: str) -> bytes:
    return (HEADER + "".join(f"{row}\n" for row in rows)).encode()


GOOD = "Carton,600,400,300,3"
MALFORMED = {
    "empty": (b"", "row 1: expected Item_Name,Length,Width,Height,Quantity, got 'end of the file'"),
    "blank lines": (b"\n\n \n", "row 1: expected Item_Name"),
    "header only": (HEADER.encode(), "row 2: expected an item, got 'end of the file'; type Carton,600,400,400,12"),
    "no header": (GOOD.encode(), "row 1: expected Item_Name,Length,Width,Height,Quantity, got 'Carton,600,400,300,3'"),
    "missing column": (b"Item_Name,Length,Width,Height\nCarton,600,400,300", "row 1: expected Item_Name"),
    "unknown column": (HEADER.replace("Width", "Depth").encode(), "row 1: expected Item_Name"),
    "one more column": (HEADER.replace("\n", ",Weight\n").encode(), "row 1: expected Item_Name"),
    "column twice": (HEADER.replace("Width", "Length").encode(), "row 1: expected Item_Name"),
    "semicolons": (HEADER.replace(",", ";").encode() + b"Carton;600;400;300;3", "commas between"),
    "tabs": (HEADER.replace(",", "\t").encode() + b"Carton\t600\t400\t300\t3", "row 1: expected Item_Name"),
    "semicolons in a row": (lines(GOOD, "Box;1;2;3;4"), "row 3: expected 5 values, with commas between, got 'Box;1;2"),
    "short row": (lines(GOOD, "Box,100,200,300"), "row 3: expected 5 values"),
    "no quantity": (lines("Box,100,200,300,"), "row 2: expected 5 values"),
    "long row": (lines("Box,100,200,300,4,5"), "row 2: expected 5 values"),
    "name with a comma": (lines("Sofa, red,2200,950,850,1"), "row 2: expected 5 values, with commas between"),
    "decimal commas": (lines("Box,100,5,200,300,1"), "row 2: expected 5 values"),
    "quoted decimal comma": (lines('Box,"100,5",200,300,1'), "expected Length as a whole number above 0, got '100"),
    "decimals": (lines(GOOD, GOOD, "Box,100,200.5,300,1"), "row 4: expected Width as a whole number above 0, got '"),
    "point and zero": (lines("Box,100,200,300.0,1"), "row 2: expected Height as a whole number above 0, got '300.0'"),
    "words": (lines("Box,100,wide,300,1"), "row 2: expected Width as a whole number above 0, got 'wide'"),
    "unit": (lines("Box,100mm,200,300,1"), "got '100mm'; type digits alone, lengths in millimetres"),
    "exponent": (lines("Box,1e2,200,300,1"), "row 2: expected Length as a whole number"),
    "not a number": (lines("Box,nan,200,300,1"), "row 2: expected Length as a whole number"),
    "other digits": (lines("Box,١٠٠,200,300,1"), "row 2: expected Length as a whole number"),
    "no value": (lines("Box,,200,300,1"), "row 2: expected Length as a whole number above 0, got ''"),
    "zero": (lines("Box,100,0,300,1"), "row 2: expected Width as a whole number above 0, got '0'"),
    "negative": (lines("Box,100,200,-300,1"), "row 2: expected Height as a whole number above 0, got '-300'"),
    "no items": (lines("Box,100,200,300,0"), "row 2: expected Quantity as a whole number above 0, got '0'"),
    "negative quantity": (lines("Box,100,200,300,-1"), "row 2: expected Quantity as a whole number above 0"),
    "half an item": (lines("Box,100,200,300,0.5"), "row 2: expected Quantity as a whole number above 0"),
    "too long": (lines(GOOD, "Mast,5871,20,20,1"), "row 3: expected Length of Mast up to 5870, the container's"),
    "too high": (lines("Mast,100,100,2201,1"), "row 2: expected Height of Mast up to 2200"),
    "large": (lines("Box,999999999,200,300,1"), "row 2: expected Length of Box up to 5870"),
    "too large": (lines(f"Box,{10**30},200,300,1"), "row 2: expected Length as a whole number"),
    "endless": (lines(f"Box,{'9' * 5000},200,300,1"), "row 2: expected Length as a whole number"),
    "many": (lines("Box,10,10,10,10000"), "row 2: expected at most 999 items in a file, got '10000 up to here'"),
    "many in all": (lines(*["Box,10,10,10,100"] * 11), "row 11: expected at most 999 items in a file, got '1000 up"),
    "no name": (lines(" ,10,10,10,1"), "row 2: expected an Item_Name"),
    "control character": (lines("Bo\x1b[2Jx,10,10,10,1"), "row 2: expected an Item_Name"),
    "open quotation": (lines(GOOD, '"Box,10,10,10,1'), "row 3: expected values with commas between, got 'unexp"),
    "torn quotation": (lines('"Box" 2,10,10,10,1'), "row 2: expected values with commas between"),
    "binary": (bytes(range(128, 256)), "row 1: expected text in UTF-8"),
    "latin-1": (lines(GOOD) + "Küche,10,10,10,1\n".encode("latin-1"), "row 3: expected text in UTF-8"),
    "utf-16": (PLAIN.encode("utf-16"), "row 1: expected text in UTF-8"),
    "zeros": (bytes(100), "row 1: expected Item_Name"),
    "comment": (lines("# my items", GOOD), "row 2: expected 5 values"),
    "after a blank line": (lines("", GOOD, "", "Box,x,1,1,1"), "row 5: expected Length"),
    "after old line ends": (lines(GOOD, "Box,x,1,1,1").replace(b"\n", b"\r"), "row 3: expected Length"),
    "one of two": (lines(GOOD), "other.csv: expected a .csv with Item_Name"),
    "missing": (None, "items.csv: expected a .csv with Item_Name"),
    "folder": (None, "items.csv: expected a .csv with Item_Name"),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_file_is_refused_in_one_line_that_names_the_row(kind, tmp_path, capsys):
    data, expected = MALFORMED[kind]
    path = tmp_path / "items.csv"
    if data is not None:
        path.write_bytes(data)
    elif kind == "folder":
        path.mkdir()
    before = sorted(tmp_path.iterdir())
    files = f"[{path},{tmp_path}/other.csv]" if kind == "one of two" else path
    written = f"plan={tmp_path}/plan.csv", f"json={tmp_path}/a.json", f"render={tmp_path}/a.png"
    assert evaluate.main(["policy=largest_first", f"instances={files}", *written]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: ") and len(err) < 500
    assert expected in err and str(tmp_path) in err and sorted(tmp_path.iterdir()) == before


VARIANTS = {
    "byte order mark": PLAIN.encode("utf-8-sig"),
    "CRLF": PLAIN.replace("\n", "\r\n").encode(),
    "CR": PLAIN.replace("\n", "\r").encode(),
    "no last line end": PLAIN.strip().encode(),
    "blank lines": PLAIN.replace("\n", "\n\n").encode() + b"\n \n,,,,\n",
    "spaces": PLAIN.replace(",600,", " , 600 ,").replace("1\n", "1 \n").encode(),
    "other case": PLAIN.replace("Item_Name,Length", "item_name,LENGTH").encode(),
    "name of two words": PLAIN.replace("Item_Name", "Item Name").encode(),
    "everything quoted": PLAIN.replace("Carton,600,400,300,3", '"Carton","600","400","300","3"').encode(),
    "empty columns": PLAIN.replace("\n", ",,\n").encode(),
    "other order": b'Quantity,Height,Item_Name,Width,Length\n3,300,Carton,400,600\n1,850,"Sofa, red",950,2200\n',
    "two rows of the same": PLAIN.replace("300,3", "300,1\nCarton,600,400,300,2").encode(),
    "zeros and plus": PLAIN.replace("600", "+0600").encode(),
    "line end in a name": PLAIN.replace("Sofa, red", "Sofa,\nred").encode(),
}


@pytest.mark.parametrize("kind", VARIANTS)
def test_what_is_plainly_meant_is_accepted(kind, tmp_path):
    (tmp_path / "plain.csv").write_text(PLAIN)
    (tmp_path / "items.csv").write_bytes(VARIANTS[kind])
    plain, found = (evaluate.read_items(str(tmp_path / name), BOX) for name in ("plain.csv", "items.csv"))
    assert found == plain == [("Carton", 600, 400, 300)] * 3 + [("Sofa, red", 2200, 950, 850)]


def test_names_of_every_language_come_back(tmp_path):
    names = ["Küche", "洗濯機", "کتاب‌ها", "=1+1", '24" screen', "📦"]
    (tmp_path / "items.csv").write_text(HEADER + "".join(f"{name},100,100,100,1\n" for name in names), encoding="utf-8")
    plan = tmp_path / "plan.csv"
    rows = run(tmp_path, "policy=largest_first", f"instances={tmp_path}/items.csv", f"plan={plan}", "max_num_ems=8")
    assert sorted(name for name, *_ in boxes_of(plan)[""]) == sorted(names) and rows[0]["left_out"] == {}


def random_boxes(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Boxes that do not overlap, in random order."""
    rng = np.random.default_rng(seed)
    kept: list[tuple] = []
    for _ in range(300):
        lower = rng.integers(0, 12, 3)
        upper = lower + rng.integers(1, 6, 3)
        if not any((lower < b).all() and (a < upper).all() for a, b in kept):
            kept.append((lower, upper))
    return tuple(np.array(x) for x in zip(*kept))


@pytest.mark.parametrize("seed", range(5))
def test_each_box_is_loaded_after_what_lies_under_it_and_behind_it(seed):
    lower, upper = random_boxes(seed)
    order = evaluate.loading_order(lower, upper)
    assert sorted(order) == list(range(len(lower)))
    names = [("x", *map(int, lower[i]), *map(int, upper[i] - lower[i])) for i in order]
    check(names, Counter({name[:1] + tuple(map(str, name[4:])): 99 for name in names}), (20, 20, 20))


def test_where_boxes_wait_for_one_another_what_lies_under_comes_first():
    """A is behind B, B behind C, C under D, and D under A: all hold but the first."""
    lower = np.array([[0, 0, 3], [1, 0, 0], [2, 0, 0], [0, 2, 1]])
    upper = np.array([[1, 3, 4], [2, 1, 4], [3, 3, 1], [3, 3, 3]])
    assert evaluate.loading_order(lower, upper) == [1, 2, 3, 0]


@pytest.mark.parametrize(
    "change, expected",
    [
        (dict(x=300), "no two items in one place"),
        (dict(x=5500), "every item inside the container"),
        (dict(y=-1), "every item inside the container"),
        (dict(width=401), "only the file's items"),
        (dict(name="Box"), "only the file's items"),
    ],
)
def test_a_plan_that_cannot_be_carried_out_is_an_error(change, expected, tmp_path, monkeypatch, capsys):
    (tmp_path / "items.csv").write_text(HEADER + "Carton,600,400,300,2\n")
    place = dict(name="Carton", x=0, y=0, z=0, length=600, width=400, height=300)
    plan = [dict(item=1) | place, dict(item=2) | place | dict(x=600) | change]
    items = evaluate.read_items(str(tmp_path / "items.csv"), BOX)
    evaluate.check_plan("items.csv", [plan[0], plan[0] | dict(x=600)], items, BOX)
    evaluate.check_plan("items.csv", [], items, BOX)
    monkeypatch.setattr(evaluate, "make_best_player", lambda checkpoint, attempts: lambda key: [None])
    monkeypatch.setattr(evaluate, "make_plan", lambda state, items: plan)
    words = f"instances={tmp_path}/items.csv", f"plan={tmp_path}/plan.csv", f"json={tmp_path}/a.json"
    assert evaluate.main(["policy=largest_first", *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and expected in err and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["orders #1.csv", "a,b.csv", "[x].csv", "2024", "a: b.csv", "${x}.csv", "plain.csv"])
def test_a_file_of_items_may_have_any_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text(PLAIN)
    parse = lambda raw: evaluate.parse_command_line([f"instances={raw}"], evaluate.Config, {}, [])[0].instances
    assert parse(name) == (name,) and parse("[c.csv, 'd.csv']") == ("c.csv", "d.csv") and parse("[]") == ()


@pytest.mark.parametrize(
    "words, expected",
    [
        (["num_episodes=8"], "num_episodes: expected no such key beside instances"),
        (["max_num_items=50"], "max_num_items: expected no such key beside instances"),
        (["obs_num_ems=50"], "that are kept; type obs_num_ems=40\n"),
        (["items.csv"], "expected a checkpoint, got a .csv; type instances=items.csv"),
        (["container=20000,10,10"], "expected less than or equal to 19000"),
        (["plan=no/plan.csv"], "in a folder that exists; or leave plan out"),
        (["container=100,200"], "container=100,200: expected one more value; for example 'container=[5870,"),
        (["container=100,200,0"], "container=100,200,0: expected greater than"),
        (["container=500,2330,2200"], "row 2: expected Length of Carton up to 500"),
        (["instance=1", "render=a.png"], "expected below 1, the number of files"),
        (["plan=items.csv"], "expected different files"),
        (["plan=a.json", "json=a.json"], "expected different files"),
        (["a.pkl", "render=a.png", "curves=a.png"], "expected different files"),
        (["plan=a.txt"], "ends in .csv or .json"),
        (["instances=[items.csv,./items.csv]"], "expected different files"),
        (["instances=[]", "plan=a.csv"], "plan: expected instances=FILE.csv"),
        (["instances=[]", "container=10,10,10"], "container: expected instances=FILE.csv"),
        (["policy=greedy"], "policy=greedy: expected a checkpoint"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(words, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "items.csv").write_text(PLAIN)
    words = [*words, *(["instances=items.csv"] if "instances" not in words[0] else [])]
    words += ["policy=largest_first"] if "policy=greedy" not in words else []
    assert evaluate.main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and expected in err
    assert [path.name for path in tmp_path.iterdir()] == ["items.csv"] and (tmp_path / "items.csv").read_text() == PLAIN
