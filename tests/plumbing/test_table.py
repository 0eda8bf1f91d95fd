"""Tables: what is forgiven and what refused, and which film a row means."""

import gzip
import time

import pytest

from plumbing.launch import UserError
from plumbing.table import Finder, read_cells, read_list, read_table, without_suffix


# ---------------------------------------------------------------- files
def test_a_table_is_read_whatever_its_spaces_commas_and_line_ends(tmp_path):
    path = tmp_path / "t.csv"
    text = '\ufeffname, label ,b\r\n a.png , "x, y" ,1,\r\n\r\nb.png\r\n'
    path.write_bytes(text.encode())
    assert read_table(path) == [
        {"name": "a.png", "label": "x, y", "b": "1"},
        {"name": "b.png", "label": "", "b": ""},
    ]
    assert read_table(path, "b", "name") == [
        {"b": "1", "name": "a.png"},
        {"b": "", "name": "b.png"},
    ]


def test_a_missing_column_is_named_with_those_that_are_there(tmp_path):
    for header, names in (("a,c", "a, c"), ("", "none")):
        (tmp_path / "t.csv").write_text(f"{header}\n1,2\n" if header else "")
        with pytest.raises(UserError, match=f"t.csv: no column b; its columns are {names}$"):
            read_table(tmp_path / "t.csv", "b")


NAMES = "name,Erguß\nä.png,1\n"


@pytest.mark.parametrize(
    "data",
    [
        NAMES.encode(),
        NAMES.encode("utf-8-sig"),
        NAMES.encode("utf-16"),
        NAMES.encode("utf-16-le"),
        b"\xfe\xff" + NAMES.encode("utf-16-be"),
        NAMES.encode("utf-16-be"),
        NAMES.replace(",", "\t").encode("utf-16"),  # Excel's "Unicode text"
        NAMES.replace(",", ";").encode(),
        NAMES.replace(",", "\t").replace("\n", "\r\n").encode(),
        NAMES.replace("\n", "\r").encode(),  # an old Macintosh's
        b"sep=;\r\n" + NAMES.replace(",", ";").encode(),
        gzip.compress(NAMES.encode()),
        b"\n,,,\n" + NAMES.replace("\n", ",,\n").encode() + b",,,\n,,,\n\n",
        b'"name","Ergu\xc3\x9f"\r\n"\xc3\xa4.png","1"',
        ("\ufeff\ufeff" + NAMES).encode(),
    ],
)
def test_a_table_is_read_however_it_is_saved(tmp_path, data):
    (tmp_path / "t.csv").write_bytes(data)
    assert read_table(tmp_path / "t.csv", "name", "Erguß") == [{"name": "ä.png", "Erguß": "1"}]


def test_a_separator_that_the_file_names_counts(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("sep=;\nname;size, px, of the film\na;1,5\n")
    assert read_cells(path) == (["name", "size, px, of the film"], [(3, ["a", "1,5"])])


def test_of_several_separators_in_the_header_the_most_frequent_counts(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("name;size, px;b\na;1,5;2\nb;2;3\n")
    assert read_cells(path) == (
        ["name", "size, px", "b"],
        [(2, ["a", "1,5", "2"]), (3, list("b23"))],
    )
    path.write_text("name|label|b\na|Mass, left|2\n")
    assert read_cells(path) == (["name", "label", "b"], [(2, ["a", "Mass, left", "2"])])
    path.write_text('"a;\nb;c;d",e\n1,2\n')
    assert read_cells(path) == (["a;\nb;c;d", "e"], [(3, list("12"))])


def test_quoted_line_ends_do_not_shift_the_numbers_of_lines(tmp_path):
    (tmp_path / "t.csv").write_bytes(b'a,b\r\n"x\ny",1\r\n\r\nz,2\r\n')
    assert read_cells(tmp_path / "t.csv")[1] == [(2, ["x\ny", "1"]), (5, ["z", "2"])]


@pytest.mark.parametrize(
    "data, message",
    [
        ("a,b\n1,Erguß".encode("cp1252"), "cannot be read as a table: line 2 is no UTF-8"),
        (b"\x1f\x8bjunk", "cannot be read as a table"),
        (b"PK\x03\x04rest", "cannot be read as a table: it is an Excel workbook"),
        (b"\xd0\xcf\x11\xe0rest", "it is an Excel workbook"),
        (b"<!DOCTYPE html><html>", "it is an Excel workbook, a web page"),
        (b"a,b\n1,\0\n", "zero bytes"),
        (b"a,b\n1,2,3\n", "line 2: '3' is in column 3, which the header does not name"),
        (b"a,b,\n1,2,\n1,2,x\n", "line 3: 'x' is in column 3"),
        (b"a b,b,A_B\n1,2,3\n", "two columns are called a b and A_B"),
        (b'a,b\n1,2\n"3,4\n5,6\n', "line 3: cannot be read as a table"),
        (None, "cannot be read as a table .No such file"),
    ],
)
def test_what_is_no_table_is_one_line(tmp_path, data, message):
    if data:
        (tmp_path / "t.csv").write_bytes(data)
    with pytest.raises(UserError, match=message) as error:
        read_table(tmp_path / "t.csv")
    assert "\n" not in str(error.value) and "t.csv" in str(error.value)


def test_a_title_above_the_names_of_the_columns_is_told(tmp_path):
    for title in ("Study of 2024", "Study of 2024,,"):
        (tmp_path / "t.csv").write_text(f"\n{title}\nfilename,label\na,1\n")
        with pytest.raises(UserError, match="line 'Study of 2024' looks like a title, .* line 3"):
            read_cells(tmp_path / "t.csv")


def test_lists_keep_their_numbers_and_names_their_dots(tmp_path):
    path = tmp_path / "l.txt"
    path.write_bytes(b"a.png 0,1,0\r\nb,1\r\n\r\nc\r\n")
    assert read_list(path) == [("a.png", (0, 1, 0)), ("b", (1,)), ("c", ())]
    path.write_text("a.png zero one")
    with pytest.raises(UserError, match="l.txt: not a split list"):
        read_list(path)
    assert without_suffix("DX.1.2.392.png") == "DX.1.2.392"
    assert without_suffix("CR.1.3.12") == "CR.1.3.12"
    assert without_suffix("a/b.dicom") == "a/b"


# ---------------------------------------------------------------- paths
FINDS = [  # films, a row, the film that it means
    (["a/b/1.png", "1.png"], "b/1.png", "a/b/1.png"),
    (["a/b/1.png", "c/2.png"], "1.png", "a/b/1.png"),
    (["a/b/1.png", "1.png"], "1.png", "1.png"),
    (["b/1.png", "1.png"], "/home/me/a/b/1.png", "b/1.png"),
    (["x/1.png"], "x/1", "x/1.png"),
    (["x/1.png"], "x/1.dcm", "x/1.png"),
    (["x/1.png", "x/1.dcm"], "1.dcm", "x/1.dcm"),
    (["x/1.png", "y/1.PNG"], "1.PNG", "y/1.PNG"),
    (["x/Film.PNG"], "X/film.png", "x/Film.PNG"),
    (["x/1.png"], "C:\\data\\x\\1.png", "x/1.png"),
    (["x/1.png"], ".\\x/1.png", "x/1.png"),
    (["x/1.png"], "https://host/set/x/1.png?raw=1", "x/1.png"),
    (["x/u\u0308.png"], "\u00fc.png", "x/u\u0308.png"),  # decomposed, as on macOS
    (["1.2.840.3.dcm"], "1.2.840.3", "1.2.840.3.dcm"),
    (["x/1.png"], "11.png", None),
    (["x/1.png"], "x/1.npy", None),
]


@pytest.mark.parametrize("films, row, film", FINDS)
def test_a_row_finds_its_film_by_its_path(films, row, film):
    (place,) = Finder(films).find([row])
    assert [films[i] for i in place.films] == ([film] if film else [])
    assert not place.is_elsewhere


def test_what_may_mean_two_films_is_not_decided():
    for films in (["x/1.png", "y/1.png"], ["1.png", "1.jpg"], ["A.png", "a.PNG"]):
        row = {"1.png": "1.dcm", "A.png": "a.pNg"}.get(films[0], "1.png")
        assert len(Finder(films).find([row])[0].films) == 2


def test_a_film_in_another_folder_is_found_by_its_name_if_that_is_unique():
    films = ["images/1.png", "images/2.png", "more/2.png", "p1/view.png"]
    rows = ["old/1.png", "old/2.png", "p1/view.png", "p2/view.png", "q/view.png"]
    places = Finder(films).find(rows)
    assert [place.films for place in places] == [[0], [], [3], [], []]
    assert [place.is_elsewhere for place in places] == [True, False, False, False, False]
    assert [place.films for place in Finder(films[3:]).find(rows[3:])] == [[], []]


def test_a_film_is_not_taken_from_another_folder_when_that_of_the_row_is_there():
    films = ["siteA/only.png", "siteA/1.png", "x/2.png", "a/images/3.png", "4.png", "siteB/5.png"]
    rows = ["siteB/only.png", "SITEB/1.png", "siteC/2.png", "data/images/3.png", "site/4.png"]
    places = Finder(films).find([*rows, "siteB/5.png"])
    assert [place.films for place in places] == [[], [], [2], [3], [4], [5]]
    assert Finder(films).find(rows)[0].films == [0]  # of siteB the table knows nothing else


def test_finding_many_films_takes_seconds():
    many = [f"train/patient{k:05d}/study1/view1_frontal.jpg" for k in range(20000)]
    began = time.process_time()
    places = Finder(many).find([f"CheXpert-v1.0/{name}" for name in many])
    assert [place.films for place in places] == [[k] for k in range(20000)]
    assert time.process_time() - began < 10
