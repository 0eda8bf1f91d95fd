"""What the columns of a person's table ask to learn: answers of yes and no, classes, or masks.

What is missing or uncertain is counted; what cannot be understood is refused with its line.
"""

import difflib
import functools
import re
import sys
from collections import Counter
from itertools import chain, combinations
from os.path import commonprefix
from pathlib import Path
from typing import NamedTuple

from plumbing.film import SUFFIXES
from plumbing.launch import UserError
from plumbing.table import (
    MISSING,
    NO,
    OTHER,
    UNCERTAIN,
    YES,
    answer,
    as_path,
    column_key,
    is_negative,
    plain,
    read_cells,
    whole_number,
)

# What columns are called, as table.column_key writes it; the first that is there counts.
FILM = (
    "filename imagefilename imagefile filepath imagepath file image path imageindex imageid "
    "imagename img imgid imgname imgpath dicomid dicom dicomfile dicompath dcm film filmid "
    "dateiname datei bilddatei fichier nomdefichier archivo arquivo nomefile"
).split()
MASK = "mask maskfile maskfilename maskpath maskname maskimage segmentation".split()
LABEL = (
    "label labels findinglabels findinglabel findings finding class classes classname diagnosis "
    "diagnoses target targets pathology pathologies disease category groundtruth"
).split()

# What a formula leaves that failed, in any language, and a column that was too narrow.
SHEET_ERROR = re.compile(r"#\w[\w/]*[!?]|#+")

# How a reader says that he is not sure.
DOUBT = re.compile(
    r"[?()\[\]]|\b(possibl[ey]|probabl[ey]|likely|suspect(ed)?|susp|suspicion of|suspicious for|"
    r"presumed|questionable|query|rule out|maybe|v\.\s?a|verdacht( auf)?|fraglich(e[rns]?)?|"
    r"unklare?[rns]?|mögliche?[rns]?|wahrscheinlich(e[rns]?)?|vermutlich(e[rns]?)?|suspicion de|"
    r"douteu(x|se)|posible|sospecha de|dudos[oa]|possível|provável|suspeita de|possibile|"
    r"probabile|sospett[oa]( di)?)\b\.?",
    re.IGNORECASE,
)

# How he says that there is none.
DENIALS = "no non not without kein keine keinen ohne nicht sans pas sin sem senza nessun".split()

# What is no class.
NO_CLASS = {
    "a doubt": DOUBT,
    "an error of the spreadsheet": SHEET_ERROR,
    "run lengths": re.compile(r"\d+(\s+\d+)+"),
    "a date": re.compile(r"\d{1,4}[-./]\d{1,2}[-./]\d{1,4}\b.*"),
    "a number": re.compile(
        r"[+-]?\d+([.,]\d*)?([eE][+-]?\d+)?\s*%?|[+-]?\d+[.,]\d+\s*[a-zµ]+(/[a-z]+)?", re.IGNORECASE
    ),
    "an age": re.compile(r"\d+\s*([ymd]|yrs?|years?|months?|days?)", re.IGNORECASE),
    "a file": re.compile(
        r".*\.(npy|npz|nii|gz|mat|json|xml|txt|csv|pth?|h5|hdf5|pkl|pdf|svg|zip)", re.IGNORECASE
    ),
}
COMMENT = re.compile(
    "comment|kommentar|bemerk|anmerk|remar[kq]|freitext|freetext|^notes?$|notiz|hinweis|"
    "observaciones|observacoes|osservazion"
)
NO_FINDING = re.compile(  # though of 1 and 2, or mostly of 0 and 1
    "sex|sesso|gender|geschl|genre|view|side|seite|visit|site|hospital|klinik$|center|centre|"
    "zentrum|scanner|gerat|geraet|group|gruppe|grupo|cohort|kohorte|ward|station|"
    "severity|schwere|score|quality|qualitat|follow|smok|rauch|number|anzahl|count"
)
MAX_CODES = 20  # different numbers in a column of classes
MAX_CLASSES = 300  # different names; PadChest has 174


# ---------------------------------------------------------------- columns
class Sheet:
    """A table by columns: cells {column: one per row}, lines: where each row stands in the file."""

    def __init__(self, path):
        self.path = Path(path)
        self.notes = []
        header, rows = read_cells(path)
        if not rows:
            raise UserError(f"{path}: no row below its header ({', '.join(header) or 'empty'})")
        for line, cells in rows:
            if len(cells) < len(header):
                raise UserError(
                    f"{path}, line {line}: {len(cells)} cells where the header has {len(header)}: "
                    "is the file cut off?"
                )
        self.lines = [line for line, _ in rows]
        columns = zip(*(cells for _, cells in rows), strict=True)
        self.cells = {name: cells for name, cells in zip(header, columns, strict=True) if name}
        self.named = {plain(name): name for name in self.cells}

    def refuse(self, row: int, message: str):
        """Raise UserError about a row."""
        raise UserError(f"{self.path}, line {self.lines[row]}: {message}")

    def column(self, names, what: str) -> str | None:
        """The column for `what` by the first of its usual names that is there; None without any."""
        called = {}
        for name in self.cells:
            called.setdefault(column_key(name), []).append(name)
        fitting = list(chain.from_iterable(called.get(name, ()) for name in names))
        if len(fitting) > 1:
            self.notes.append(f"{what}: column {fitting[0]}, not {', '.join(fitting[1:])}")
        return fitting[0] if fitting else None

    def film_column(self) -> str:
        """The column that names the films. UserError when there is none, or a row has no film."""
        column = self.column(FILM, "film")
        if not column:
            if any(Path(name).suffix.lower() in SUFFIXES for name in self.cells):
                raise UserError(
                    f"{self.path}: its first row holds data: write the names of the columns "
                    "above it, such as filename,label"
                )
            raise UserError(
                f"{self.path}: no column filename (or file, image, path, Image Index, image_id, "
                f"dicom_id ...); its columns are {', '.join(self.cells)}"
            )
        for row, cell in enumerate(self.cells[column]):
            if answer(cell) is MISSING:
                self.refuse(row, f"column {column} names no film ({cell!r})")
        return column

    def asked_columns(self, asked: str, taken) -> list[str]:
        """The columns that --column names, one or several with commas between."""
        found = []
        for name in [asked] if plain(asked) in self.named else asked.split(","):
            column = self.named.get(plain(name))
            if column is None:
                like = difflib.get_close_matches(name, self.cells, 1)
                hint = f"its columns are {', '.join(self.cells)}"
                hint = f"did you mean {like[0]}?" if like else hint
                raise UserError(f"{self.path}: no column {name}; {hint}")
            if column in taken:
                raise UserError(f"{self.path}: column {column} names {taken[column]}, no label")
            found.append(column)
        return found


# ---------------------------------------------------------------- what is to be learnt
class Goal(NamedTuple):
    """What the rows of a table ask for.

    targets: 0, 1 or None (not known) per label; None for a row without any, which is left out.
    masks: names of files, "" for an empty mask; only of kind mask. against: the other class, where
    every row is one of two. unused: the columns that say nothing of all this.
    """

    kind: str  # labels or mask
    labels: tuple
    targets: list
    notes: list[str]
    masks: list | None = None
    against: str = ""
    unused: tuple = ()


def read_goal(sheet: Sheet, asked, taken: dict, uncertain: str, can_be_mask: bool) -> Goal:
    """Find out what is to be learnt: `asked` (--column), or the column of masks, if these are
    wanted, else of labels, else every column that answers yes or no.

    taken: {column: what it names} of the other columns. UserError when nothing can be learnt.
    """
    if asked:
        columns = sheet.asked_columns(asked, taken)
    else:
        column = sheet.column(MASK, "mask") if can_be_mask else None
        column = column or sheet.column(LABEL, "label")
        columns = [column] if column else []
    is_named = len(columns) > 0
    if len(columns) != 1:
        goal = read_answers(sheet, columns or answer_columns(sheet, taken), uncertain)
        columns = goal.labels
    elif is_mask_column(sheet, columns[0], asked):
        goal = read_masks(sheet, columns[0])
    else:
        goal = read_label_column(sheet, columns[0], uncertain)
    refuse_only_yes(sheet, columns, goal)
    rest = [name for name in sheet.cells if name not in taken and name not in columns]
    goal = goal._replace(unused=tuple(rest))
    if is_named:  # only others that could be learnt as well are worth a word
        rest = [name for name in rest if set(map(answer, sheet.cells[name])) >= {YES, NO}]
    unused = [f"columns not learnt: {', '.join(rest)}"] if rest else []
    return goal._replace(notes=[*goal.notes, *unused])


def refuse_only_yes(sheet: Sheet, columns, goal: Goal):
    """UserError when the columns never say no, but have blanks, which are no answer: a habit."""
    values = set(chain(*filter(None, goal.targets)))
    blank = sum(answer(cell) is MISSING for column in columns for cell in sheet.cells[column])
    if goal.kind == "labels" and YES in values and NO not in values and blank:
        raise UserError(
            f"{sheet.path}: column {', '.join(columns)} never says no; {blank} blank cells count "
            "as not known: write 0 where a blank means no"
        )


def read_label_column(sheet: Sheet, column: str, uncertain: str) -> Goal:
    """Read one column: of yes and no (one label), of numbers or of names of classes."""
    answers = {answer_or_negative(cell) for cell in sheet.cells[column]}
    if answers == {MISSING}:
        raise UserError(f"{sheet.path}: column {column} is empty")
    if answers <= {NO, MISSING}:
        raise UserError(f"{sheet.path}: column {column} names no class beside {NO_WORDS}")
    if OTHER in answers:
        return read_names(sheet, column, uncertain)
    return read_answers(sheet, [column], uncertain)


NO_WORDS = "0, no, normal and the like"


def answer_or_negative(cell: str):
    """What a cell answers, where 'normal', 'No Finding' and the like answer no."""
    value = answer(cell)
    return NO if value == OTHER and is_negative(cell) else value


# ---------------------------------------------------------------- columns of yes and no
def answer_columns(sheet: Sheet, taken) -> list[str]:
    """The columns that answer yes or no.

    UserError when there is none, when most cells of a column are such answers and others neither
    that nor amounts, or when a column beside them is of 1 and 2, as where 2 means no.
    """
    found = []
    coded = []
    for column, cells in sheet.cells.items():
        if column in taken:
            continue
        count = Counter(answer_or_negative(cell) for cell in cells)
        answers = count[YES] + count[NO] + count[UNCERTAIN]
        is_no_finding = bool(NO_FINDING.search(column_key(column)))
        strays = Counter(cell for cell in cells if answer_or_negative(cell) == OTHER)
        are_codes = is_no_finding and 1 not in strays.values()  # what stands once is a slip
        is_mixed = answers >= count[OTHER] > 0 and len(cells) > 1
        if is_mixed and not (are_codes or are_amounts(strays)):
            refuse_other(sheet, column)
        if not count[OTHER] and count[YES] + count[NO]:
            found.append(column)
        codes = {whole_number(cell) for cell in cells if answer(cell) is not MISSING}
        if {1, 2} <= codes <= {0, 1, 2, 8, 9} and not is_no_finding:
            coded.append(column)
    if found and coded:
        refuse_other(sheet, coded[0])
    if not found:
        raise UserError(
            f"{sheet.path}: no column label or mask, and none of 0 and 1; "
            f"its columns are {', '.join(sheet.cells)}; --column NAME says what to learn"
        )
    return found


def are_amounts(strays) -> bool:
    """Whether the different cells that are no answers are five or more numbers: pack years."""
    return len(strays) >= 5 and all(map(NO_CLASS["a number"].fullmatch, strays))


def refuse_other(sheet: Sheet, column: str):
    """UserError that names the first cell of a column that is no answer, if there is one."""
    advice = "correct it, or delete the column, or name those to learn: --column A,B"
    if {YES, UNCERTAIN}.isdisjoint(map(answer, sheet.cells[column])):
        advice = f"correct it, or learn column {column} alone, as classes: --column {column}"
    for row, cell in enumerate(sheet.cells[column]):
        if answer_or_negative(cell) == OTHER:
            sheet.refuse(
                row,
                f"column {column} says {cell[:60]!r}, which is neither 1, 0, -1 nor empty: "
                + advice,
            )


def read_answers(sheet: Sheet, columns: list[str], uncertain: str) -> Goal:
    """Read columns of yes and no, one label each; what is missing or uncertain is counted."""
    values = []
    missing = Counter()
    unsure = Counter()
    become = {UNCERTAIN: {"positive": YES, "negative": NO}.get(uncertain, MISSING)}
    for column in columns:
        refuse_other(sheet, column)
        answers = [answer_or_negative(cell) for cell in sheet.cells[column]]
        missing[column] += answers.count(MISSING)
        unsure[column] += answers.count(UNCERTAIN)
        values.append([become.get(value, value) for value in answers])
    targets = [None if set(row) == {MISSING} else row for row in zip(*values, strict=True)]
    notes = [f"labels: column{'s' * (len(columns) > 1)} {', '.join(columns)}"]
    if len(columns) > 1 and missing.total():
        notes.append(f"missing: {counted(missing)}: they count in no loss and no AUROC")
    if unsure.total():
        fate = f"counted as {uncertain}"
        if uncertain == "ignore":
            fate = "left out (--uncertain positive or negative counts them)"
        notes.append(f"uncertain: {counted(unsure)}: {fate}")
    return Goal("labels", tuple(columns), targets, notes)


def counted(count: Counter) -> str:
    """How many values of which columns."""
    each = [f"{column} {cells}" for column, cells in count.items() if cells]
    return f"{count.total()} values ({', '.join(each)})"


# ---------------------------------------------------------------- columns of names
def read_names(sheet: Sheet, column: str, uncertain: str) -> Goal:
    """Read a column of classes, one or several per cell, or of numbers that stand for classes.

    A cell that is missing or uncertain leaves its row out. Two names of which every row has one are
    one question. UserError when the column cannot be classes.
    """
    findings, notes = read_findings(sheet, column, uncertain)
    labels = sorted(set().union(*filter(None, findings)), key=in_order)
    if not labels:
        raise UserError(f"{sheet.path}: column {column} names no class beside {NO_WORDS}")
    against = ""
    if len(labels) == 2 and all(found is None or len(found) == 1 for found in findings):
        denials = [word + plain(labels[0]) for word in DENIALS]
        if plain(labels[1]) in denials:  # then other names, too, count as "no", not as "yes"
            labels.reverse()
        else:
            against = labels[0]
        notes.append(
            f"{labels[1]} (1) is learnt against {labels[0]} (0): each film is one of the two; "
            "should they mean yes and no, write yes and no"
        )
        labels = labels[1:]
    targets = [found if found is None else target_of(found, labels) for found in findings]
    return Goal("labels", tuple(labels), targets, notes, against=against)


def in_order(name: str) -> tuple[int, str]:
    """Sort names by the alphabet, and before them numbers by their size."""
    return (int(name) if name.isdecimal() else sys.maxsize), name


def read_findings(sheet: Sheet, column: str, uncertain: str) -> tuple[list, list[str]]:
    """Read what a column of names or numbers finds → {name} per row, None: not known; notes."""
    cells = sheet.cells[column]
    unsure = [row for row, cell in enumerate(cells) if answer(cell) == UNCERTAIN]
    if unsure and uncertain != "ignore":
        sheet.refuse(
            unsure[0],
            f"column {column} says {cells[unsure[0]]!r} among names of classes: nobody can tell "
            f"which of them --uncertain {uncertain} should count; leave the cell empty",
        )
    notes = [f"labels: column {column}"]
    said = {cell for cell in cells if answer(cell) not in (MISSING, UNCERTAIN)}
    if None not in map(whole_number, said):  # '2.0', as pandas writes it beside blanks, is '2'
        findings = [{str(whole_number(cell))} if cell in said else None for cell in cells]
        refuse_no_classes(sheet, column, findings, MAX_CODES)
        refuse_odd_codes(sheet, column, findings)
        notes.append("numbers are taken as classes, 0 like the others")
    else:
        named = split_names(sheet, column)
        findings, negatives = merge_spellings(named)
        refuse_no_classes(sheet, column, findings, MAX_CLASSES)
        if COMMENT.search(column_key(column)):
            raise UserError(
                f"{sheet.path}: column {column} holds comments, as its name says: these are no "
                "classes; --column NAME says what to learn, or rename the column"
            )
        refuse_slips(sheet, column, named)
        if negatives:
            words = ", ".join(map(repr, negatives))
            notes.append(f"{words} count{'s' * (len(negatives) == 1)} as no finding")
    if unsure:
        notes.append(f"uncertain: {len(unsure)} rows: left out")
    return findings, notes


def refuse_odd_codes(sheet: Sheet, column: str, codes):
    """UserError on a number that stands for no class: below 0, seen once, or, as -9, 9 and 99 often
    do, for what is missing: a code of nines or eights without the number before it.
    """
    count = Counter(code for found in codes if found for code in found)
    odd = [
        code for code in count if int(code) < 0 or (count[code] == 1 and len(count) <= MAX_CODES)
    ]
    gaps = [code for code in count if str(int(code) - 1) not in count]
    odd += [code for code in gaps if re.fullmatch("9+|88+", code)]
    is_classes = 2 * len(odd) < len(count) + 1
    for row, found in enumerate(codes):
        if is_classes and found and not found.isdisjoint(odd):
            sheet.refuse(
                row,
                f"column {column} says {sheet.cells[column][row]!r}, a number below 0, one that no "
                "other row has, or a code for missing: is it a class? Leave the cell empty where "
                "it is missing",
            )


def target_of(findings, labels) -> tuple[int, ...]:
    """One 0 or 1 per label: whether it is among the findings."""
    return tuple(int(label in findings) for label in labels)


def split_names(sheet: Sheet, column: str) -> list[list[str] | None]:
    """Divide cells like 'Effusion|Mass' into names; None where nothing is said.

    | ; and line ends always divide, a comma where none of these is in the column. What else may
    join names (/ + & and) divides where all parts stand alone elsewhere, and is part of a name
    where none does. UserError on a cell between the two, or on a part that is no class.
    """
    cells = sheet.cells[column]
    divider = r"[|;\n]" if any(re.search(r"[|;\n]", cell) for cell in cells) else COMMA
    rows = [None if is_unsaid(cell) else parts_of(cell, divider) for cell in cells]
    alone = {plain(name) for name in chain(*filter(None, rows)) if not JOINT.search(name)}
    split = []
    for row, names in enumerate(rows):
        divided = names and []
        for name in names or ():
            parts = JOINT.split(name)
            are_known = [plain(part) in alone for part in parts]
            if len(parts) > 1 and any(are_known) and not all(are_known):
                sheet.refuse(
                    row,
                    f"column {column} says {name!r}: one finding or several? Join several with |, "
                    "and spell each as elsewhere",
                )
            divided += parts if all(are_known) else [name]
        for name in filter(what_instead, divided or ()):
            sheet.refuse(
                row,
                f"column {column} says {name[:60]!r}, {what_instead(name)} and no class: correct "
                "it, or say with --column what to learn",
            )
        split.append(divided)
    return split


# What may join two findings, or belong to the name of one. The comma of 135,4 is none.
COMMA = r"(?<!\d),|,(?!\d)"
JOINT = re.compile(rf"\s*(?:{COMMA}|[/+&]|\band\b)\s*(?=\S)", re.IGNORECASE)


def is_unsaid(cell: str) -> bool:
    """Whether a cell of names is missing or uncertain; 'none' is a word for no finding."""
    return answer(cell) in (MISSING, UNCERTAIN) and not is_negative(cell)


def parts_of(cell: str, divider: str) -> list[str]:
    """The names of a cell; of a list as Python prints it, ['Effusion', 'Mass'], too."""
    listed = re.fullmatch(r"[\[({](.*)[\])}]", cell)
    if listed:
        parts = [part.strip(" '\"") for part in re.split(divider + "|,", listed[1])]
        return list(filter(None, parts)) or ["none"]  # an empty list finds nothing
    parts = [part.strip(" /&,") for part in re.split(divider, cell)]
    return list(filter(None, parts))


@functools.lru_cache(100_000)
def what_instead(name: str) -> str:
    """What a name is, where it is no name of a class; else ""."""
    if is_negative(name):
        return ""
    if answer(name) != OTHER:
        return "an answer"
    return next((what for what, pattern in NO_CLASS.items() if pattern.fullmatch(name)), "")


def merge_spellings(named) -> tuple[list[set[str] | None], list[str]]:
    """Merge spellings that differ in case, spaces and the like; the most frequent one is kept.

    → the findings of each row, without the words for no finding; those words
    """
    spellings = {}
    for names in filter(None, named):
        for name in names:
            spellings.setdefault(plain(name), Counter())[name] += 1
    best = {key: count.most_common(1)[0][0] for key, count in spellings.items()}
    negatives = sorted(name for name in best.values() if is_negative(name))
    findings = []
    for names in named:
        is_said = names is not None
        findings.append({best[plain(n)] for n in names}.difference(negatives) if is_said else None)
    return findings, negatives


def refuse_no_classes(sheet: Sheet, column: str, findings, limit: int):
    """UserError when a column has so many different values, or so few alike, that they are no
    classes: ages, comments, names.
    """
    count = Counter(name for found in findings if found for name in found)
    rows = sum(found is not None for found in findings)
    seldom = sum(films == 1 for films in count.values())
    is_mostly_seldom = len(count) >= 5 and 2 * seldom > len(count)
    if len(count) > limit or (is_mostly_seldom and (2 * len(count) > rows or len(count) > 50)):
        first = ", ".join(repr(name[:40]) for name in list(count)[:3])
        raise UserError(
            f"{sheet.path}: column {column} has {len(count)} different values in {rows} rows "
            f"(such as {first}): these are no classes; --column NAME says what to learn"
        )


def refuse_slips(sheet: Sheet, column: str, named):
    """UserError on a name that is another one in doubt (pneumonia?), or a rare one that is a slip
    of the pen away from another (pneumonai): its films would count as negative for the other.
    """
    first = {}
    count = Counter()
    for row, names in enumerate(named):
        for name in names or ():
            first.setdefault(plain(name), (row, name))
            count[plain(name)] += 1
    for (other, films), (odd, odd_films) in combinations(count.most_common(), 2):
        row, name = first[odd]
        usual = first[other][1]
        if is_negative(name) and is_negative(usual):
            continue
        is_rare = odd_films < 3 or odd_films < 0.02 * films
        if is_same_in_doubt(name, usual) or (is_rare and is_slip(name, usual)):
            sheet.refuse(
                row,
                f"column {column} says {name!r} ({odd_films} ×) beside {usual!r} ({films} ×), "
                "which would be two classes: write one of them, or nothing where it is not known; "
                "if both are meant, make a column of 0 and 1 of each (--column A,B)",
            )


def is_same_in_doubt(one: str, other: str) -> bool:
    """Whether two names say the same when words of doubt, question marks and brackets go."""
    bare, other_bare = (plain(" ".join(DOUBT.sub(" ", name).split())) for name in (one, other))
    return bare == other_bare != ""


def is_kind_of(name: str, usual: str) -> bool:
    """Whether a name holds another and does not deny it: Pneumonie li., Pleuraerguss, but not
    keine Pneumonie, abnormal or Pseudotumor.
    """
    words, usual = (" ".join(re.findall(r"[^\W_]+", text.casefold())) for text in (name, usual))
    rest = re.sub(rf"\b(?!pseudo)(\w{{3,}})?{re.escape(usual)}(s|es|e|n|en)?\b", "", words)
    return usual != "" and rest != words and set(DENIALS).isdisjoint(rest.split())


def is_slip(one: str, other: str) -> bool:
    """Whether two names differ by one slip in one word: a letter too many, too few, wrong, or
    changed for its neighbour.

    Words with digits or of up to three letters tell stages and sides (covid2, AP, III), and an a
    before a word denies it (atypical).
    """
    words, others = (
        re.findall(r"\w+", re.sub(r"_|(?<=[a-z])(?=[A-Z])", " ", name)) for name in (one, other)
    )
    if len(words) != len(others):
        return False
    pairs = zip(map(str.casefold, words), map(str.casefold, others), strict=True)
    different = [sorted(pair, key=len) for pair in pairs if pair[0] != pair[1]]
    if len(different) != 1:
        return False
    short, long = different[0]
    if len(long) - len(short) > 1 or len(short) < 4 or re.search(r"\d", short + long):
        return False
    k = len(commonprefix([short, long]))
    if len(short) < len(long):
        return short[k:] == long[k + 1 :] and long != f"a{short}"
    is_swapped = short[k : k + 2] == long[k : k + 2][::-1] and short[k + 2 :] == long[k + 2 :]
    return is_swapped or short[k + 1 :] == long[k + 1 :]


# ---------------------------------------------------------------- columns of masks
def is_mask_column(sheet: Sheet, column: str, asked: str | None) -> bool:
    """Whether a column names pictures of masks: by its name, unless asked for, or by its cells."""
    is_called_mask = column_key(column) in MASK and not asked
    suffixes = {Path(as_path(cell)).suffix.lower() for cell in sheet.cells[column]}
    return is_called_mask or not suffixes.isdisjoint(SUFFIXES)


def read_masks(sheet: Sheet, column: str) -> Goal:
    """Read a column of mask files; an empty cell is an empty mask, 'NA' and the like leave out.

    UserError on what cannot be the name of a picture: run lengths, .npy files.
    """
    masks = []
    for row, cell in enumerate(sheet.cells[column]):
        for kind in ("run lengths", "a file"):
            if NO_CLASS[kind].fullmatch(cell):
                sheet.refuse(
                    row,
                    f"column {column} says {cell[:60]!r}, {kind} and no picture: save each mask as "
                    "PNG and write its name",
                )
        masks.append(None if cell and answer(cell) is MISSING else cell)
    targets = [None if mask is None else () for mask in masks]
    notes = [f"masks: column {column}"]
    if masks.count(""):
        notes.append(f"masks: {masks.count('')} rows have none: their masks are empty")
    return Goal("mask", (column,), targets, notes, masks)
