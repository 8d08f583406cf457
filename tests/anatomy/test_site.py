import pytest

from surgeon.anatomy import Entry, Region, Site
from surgeon.errors import BadInput


@pytest.mark.parametrize(
    "text",
    [
        "L2.mlp.down",
        "L4.mlp.down.e17",
        "L0.attn.out",
        "embed",
        "final_norm",
        "L3.norm.self_attn.q_norm",
    ],
)
def test_a_site_reads_as_it_prints(text):
    assert str(Site.parse(text)) == text


def test_the_parts_of_a_site():
    assert Site.parse("L4.mlp.down.e17") == Site(4, "mlp.down", 17)
    assert Site.parse("embed") == Site(None, "embed")


def test_an_entry_is_row_then_column():
    entry = Entry.parse("L2.mlp.down[3968, 7003]")
    assert (entry.row, entry.col) == (3968, 7003)
    assert str(entry) == "L2.mlp.down[3968, 7003]"
    assert Entry.parse(" L2.mlp.down[3968,7003] ") == entry


@pytest.mark.parametrize(
    ("text", "geometry"),
    [("[1, 2]", "single"), ("[1, :]", "row"), ("[:, 2]", "column"), ("[:, :]", "matrix")],
)
def test_regions(text, geometry):
    region = Region.parse("L0.mlp.down" + text)
    assert region.geometry == geometry
    rows, cols = region.rows_cols((3, 4))
    assert len(rows) == len(cols) == {"single": 1, "row": 4, "column": 3, "matrix": 12}[geometry]


@pytest.mark.parametrize(
    "text",
    [
        "banana",
        "L0.mlp.down",
        "L0.mlp.down[1]",
        "L0.mlp.down[1, 2, 3]",
        "L0.mlp.down[-1, 2]",
        "[1, 2]",
        "L0.mlp.down[a, b]",
        "",
    ],
)
def test_what_is_not_an_entry_is_said_so(text):
    with pytest.raises(BadInput, match="is not an entry"):
        Region.parse(text)


def test_a_row_is_no_entry():
    with pytest.raises(BadInput, match="whole row or column"):
        Entry.parse("L0.mlp.down[1, :]")


@pytest.mark.parametrize("text", ["[3, 0]", "[0, 4]", "[3, :]", "[:, 4]"])
def test_an_index_out_of_range_names_the_shape(text):
    with pytest.raises(BadInput, match="out 3, in 4"):
        Region.parse("L0.mlp.down" + text).rows_cols((3, 4))


def test_sites_sort_by_layer_and_those_outside_come_first():
    texts = ["final_norm", "norm.encoder.enc_norm", "L0.mlp.down", "L0.mlp.down.e1", "L2.attn.q"]
    sites = [Site.parse(text) for text in texts]
    assert sorted(sites) == sites
    entries = [Entry(site, 1, 2) for site in sites]
    assert sorted(entries) == entries
    assert sites[0] <= sites[0] < sites[-1]
