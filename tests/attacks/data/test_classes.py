"""From the labels of a set to the logits of a model."""

import json

import pytest
import torch

from ironmoe.attacks.data import DataError, match_classes, read_class_map
from ironmoe.attacks.data.imagenet import are_imagenet, imagenet_classes, imagenet_names

WNIDS = [each.wnid for each in imagenet_classes()]
AS_TRANSFORMERS = [", ".join(each.synonyms) for each in imagenet_classes()]
AS_TORCHVISION = [each.synonyms[0] for each in imagenet_classes()]


def test_the_standard_order_is_that_of_the_ids_and_known_classes_lie_where_everybody_has_them():
    assert sorted(WNIDS) == WNIDS and len(set(WNIDS)) == 1000
    known = {0: "n01440764", 1: "n01443537", 281: "n02123045", 517: "n03126707", 999: "n15075141"}
    assert {index: WNIDS[index] for index in known} == known
    names = imagenet_names()
    assert names.find("goldfish") == 1 and names.find("tabby, tabby cat") == 281
    assert names.find("crane") is None and "crane" in names  # a bird and a machine
    assert names.find("Cardigan") == 264 and names.find("cardigan") == 474  # a dog and a garment


def test_whole_numbers_are_indices_of_the_logits():
    found = match_classes(None, torch.tensor([0, 9, 3]), logits=10, model_names=list("abcdefghij"))
    assert found.logits is None and found.names == list("abcdefghij") and found.note == ""
    assert match_classes(None, torch.tensor([2]), logits=3).names == ["0", "1", "2"]


@pytest.mark.parametrize("labels", [[-1, 8], [0, 11, 99], [1, 10], [10]])
def test_numbers_that_are_no_indices_are_named_and_never_renumbered(labels):
    with pytest.raises(DataError, match=rf"0 … 9, got {min(labels)} … {max(labels)}.*class map"):
        match_classes(None, torch.tensor(labels), logits=10)


def test_names_are_matched_whatever_their_order_and_spelling_and_may_be_a_part():
    found = match_classes(
        ["Fire  Engine", "CAT"], None, logits=3, model_names=["cat", "dog", "fire_engine"]
    )
    assert found.logits.tolist() == [2, 0] and found.note == ""


@pytest.mark.parametrize("names", [AS_TRANSFORMERS, AS_TORCHVISION, WNIDS])
def test_wordnet_ids_find_the_standard_order_in_the_names_of_a_model(names):
    chosen = [999, 0, 517]
    found = match_classes([WNIDS[i] for i in chosen], None, logits=1000, model_names=names)
    assert found.logits.tolist() == chosen and found.note == "" and found.names == names


def test_synonyms_are_names_too():
    found = match_classes(["tench", "tabby_cat"], None, logits=1000, model_names=AS_TRANSFORMERS)
    assert found.logits.tolist() == [0, 281]


def test_the_standard_order_is_a_guess_where_the_model_names_nothing():
    for names in (None, [f"LABEL_{i}" for i in range(1000)]):
        found = match_classes([WNIDS[7]], None, logits=1000, model_names=names)
        assert found.logits.tolist() == [7] and "which is a guess" in found.note


def test_another_order_of_the_classes_is_no_standard_order():
    backwards = AS_TORCHVISION[::-1]
    assert are_imagenet(AS_TORCHVISION) and not are_imagenet(backwards)
    for name in (WNIDS[0], "tench", "Tinca tinca"):
        by_name = match_classes([name], None, logits=1000, model_names=backwards)
        assert by_name.logits.tolist() == [999] and by_name.note == ""
    with pytest.raises(DataError, match="1 cannot be matched: n02012849"):
        match_classes([WNIDS[134]], None, logits=1000, model_names=backwards)  # a crane


def test_a_name_that_two_logits_have_is_refused():
    with pytest.raises(DataError, match="got crane, which several have"):
        match_classes(["crane"], None, logits=2, model_names=["crane", "crane"])
    with pytest.raises(DataError, match="got CRANE, which several have"):
        match_classes(["CRANE"], None, logits=2, model_names=["crane", "Crane"])
    with pytest.raises(DataError, match="class map"):
        match_classes(["crane"], None, logits=1000, model_names=AS_TORCHVISION)


@pytest.mark.parametrize(
    "model",
    [["cardigan", "Cardigan", "eel"], ["eel", "x"], ["cardigan", "Cardigan, Cardigan Welsh corgi"]],
)
def test_names_that_differ_in_capital_letters_alone_stay_apart(model):
    given = {"Cardigan": 1, "cardigan": 0}
    for names in (["Cardigan", "cardigan"], ["cardigan", "Cardigan"]):
        wanted = [given[name] for name in names]
        sizes = {"logits": len(model), "model_names": model}
        found = match_classes(names, None, **sizes, class_map=given)
        assert found.logits.tolist() == wanted
        if "cardigan" in model:
            assert match_classes(names, None, **sizes).logits.tolist() == wanted
    with pytest.raises(DataError, match="got none for CARDIGAN"):
        match_classes(["CARDIGAN"], None, logits=2, class_map=given)


@pytest.mark.parametrize(
    ("names", "model"),
    [
        (["Cat", "CAT"], ["cat", "dog"]), (["01", "1"], None), (["straße", "strasse"], ["strasse"]),
        (["tabby", "n02123045"], AS_TRANSFORMERS), (["cat", "kitty"], ["cat, kitty", "dog"]),
    ],
)  # fmt: skip
def test_two_classes_of_the_data_have_no_logit_in_common(names, model):
    logits = 2 if model is None else len(model)
    with pytest.raises(DataError, match=f"{names[0]!r} and {names[1]!r} for logit .*class map"):
        match_classes(names, None, logits=logits, model_names=model)
    found = match_classes(
        names, None, logits=logits, model_names=model, class_map=dict.fromkeys(names, 0)
    )  # whoever says so may join them
    assert found.logits.tolist() == [0, 0]
    assert found.note == f"The class map joins classes at one logit, first {names[1]!r}."


def test_a_model_with_a_part_of_imagenets_classes_knows_them_by_other_names():
    names = ["English springer", "tench", "French horn, horn"]
    found = match_classes(["n01440764", "n02102040", "n03394916"], None, 3, model_names=names)
    assert found.logits.tolist() == [1, 0, 2] and found.note == "" and found.names == names
    listed = ["tench, Tinca tinca", "goldfish, Carassius auratus"]
    assert match_classes(["goldfish", "tench"], None, 2, model_names=listed).logits.tolist() == [
        1,
        0,
    ]
    with pytest.raises(DataError, match="got 2, of which 1 cannot be matched: background"):
        match_classes(["background", "goldfish"], None, 2, model_names=listed)


def test_no_order_is_guessed_where_most_names_are_imagenets():
    renamed = sorted([*sorted(set(AS_TORCHVISION)), "a", "b"])[:1000]
    assert len(renamed) == 1000
    with pytest.raises(DataError, match="cannot be matched: a"):
        match_classes(renamed, None, logits=1000)
    with pytest.raises(DataError, match="got 1000, of which 1 cannot be matched: background"):
        match_classes(["background", *WNIDS[1:]], None, logits=1000)


def test_names_that_are_numbers_are_indices_and_not_ranks():
    found = match_classes(["0", "1", "10", "2"], None, logits=11)
    assert found.logits.tolist() == [0, 1, 10, 2] and "indices of the logits" in found.note
    assert "a guess: torchvision's ImageFolder" in found.note
    assert "guess" not in match_classes(["2", "0", "1"], None, logits=11).note
    with pytest.raises(DataError, match="got 1 … 10; they look as if they began at 1"):
        match_classes([str(i) for i in range(1, 11)], None, logits=10)


def test_as_many_names_as_logits_are_matched_by_their_order_and_called_a_guess():
    found = match_classes(["bee", "cow"], None, logits=2, model_names=["Biene", "Kuh"])
    assert found.logits.tolist() == [0, 1]
    assert "which is a guess: logit 0 is 'bee', logit 1 is 'cow'" in found.note
    with pytest.raises(DataError, match="of which 1 cannot be matched: cow"):  # no guess beside one
        match_classes(["bee", "cow"], None, logits=2, model_names=["Kuh", "bee"])
    with pytest.raises(DataError, match=r"among the 3 classes of the model, .* got 2, of which 2"):
        match_classes(["bee", "cow"], None, logits=3)


def test_a_map_says_what_is_right_by_index_or_by_name(tmp_path):
    names = ["cat", "dog", "eel"]
    (tmp_path / "map.json").write_text(json.dumps({"Katze": 0, "Aal": "eel"}))
    given = read_class_map(tmp_path / "map.json")
    found = match_classes(["Aal", "Katze"], None, logits=3, model_names=names, class_map=given)
    assert found.logits.tolist() == [2, 0] and found.names == names

    (tmp_path / "map.csv").write_text("11,2\n5,0\n")
    numbers = read_class_map(tmp_path / "map.csv")
    labels = torch.tensor([11])
    found = match_classes(None, labels, logits=3, class_map=numbers)
    assert found.logits[labels].tolist() == [2]
    found = match_classes(["-1", "0", "8"], None, logits=3, class_map={"-1": 2, "0": 0, "8": 1})
    assert found.logits.tolist() == [2, 0, 1]
    with pytest.raises(DataError, match=r"got -1 … 1; they look as if they began at -1; give"):
        match_classes(["-1", "0", "1"], None, logits=3)
    with pytest.raises(DataError, match="every label of the data, got none for 12"):
        match_classes(None, torch.tensor([12]), logits=3, class_map=numbers)
    with pytest.raises(DataError, match="every class of the data, got none for Hund"):
        match_classes(["Hund"], None, logits=3, class_map=given, model_names=names)
    with pytest.raises(DataError, match=r"from 0 to 2, or to a name of the model's, got 'cow'"):
        match_classes(["a"], None, logits=3, class_map={"a": "cow"}, model_names=names)
    for bad in (3, -1):
        with pytest.raises(DataError, match=rf"from 0 to 2.* got {bad} for 'a'"):
            match_classes(["a"], None, logits=3, class_map={"a": bad})


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("map.csv", "class,logit\ngolden retriever,3\n\n'a, b',4\n".replace("'", '"')),
        ("map.tsv", "name\tindex\ngolden retriever\t3\na, b\t4\n"),
        ("map.json", '{"golden retriever": 3, "a, b": "4"}'),
    ],
)
def test_a_map_may_have_a_header_and_names_of_several_words(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert read_class_map(tmp_path / name) == {"golden retriever": 3, "a, b": 4}
    (tmp_path / "map.txt").write_text("golden retriever 3\ncat 0\n")
    assert read_class_map(tmp_path / "map.txt") == {"golden retriever": 3, "cat": 0}


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', "[1, 2]", '{"a": true}', '{"a": null}', "{"])
def test_a_map_that_cannot_be_read_is_named(tmp_path, text):
    (tmp_path / "map.json").write_text(text)
    with pytest.raises(DataError, match=r"class map .*map\.json"):
        read_class_map(tmp_path / "map.json")


def test_names_of_the_model_must_be_as_many_as_its_logits():
    with pytest.raises(DataError, match="a name for each of its 3 logits, got 2"):
        match_classes(["a"], None, logits=3, model_names=["a", "b"])
