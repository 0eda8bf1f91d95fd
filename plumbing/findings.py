"""What the columns of a person's table ask to learn: answers of yes and no, classes, or masks.

What is missing or uncertain is counted; what cannot be understood is refused with its line.
"""

import difflib
import re
import sys
from collections import Counter
from itertools import chain, combinations, pairwise, product
from pathlib import Path
from typing import NamedTuple

from plumbing.film import SUFFIXES
from plumbing.table import Sheet, as_path
from plumbing.words import (
    DENIALS,
    MISSING,
    NO,
    NO_NAMES,
    OTHER,
    UNCERTAIN,
    YES,
    answer,
    denied_by,
    is_called,
    is_denial_of,
    is_kind_of,
    is_negative,
    is_part_of,
    is_same_in_doubt,
    is_slip,
    is_unsaid,
    plain,
    tells,
    what_instead,
    whole_number,
    words_in,
)

MAX_CODES = 20  # different numbers in a column of classes
MAX_NAMED = 20  # columns in a note
MAX_CLASSES = 300  # different names; PadChest has 174
NO_WORDS = "0, no, normal and the like"


# ---------------------------------------------------------------- what is to be learnt
class Goal(NamedTuple):
    """What the rows of a table ask for.

    truth: of each row, 0, 1 or None (not known) per label; None for a whole row that is left out,
    since nothing of it is known. columns: those that were read. masks: names of files, "" for an
    empty mask; only of kind mask. against: where every row is one of two classes, the one that
    counts as 0; the other is the label.
    """

    kind: str  # labels, classes or mask
    labels: tuple
    truth: list
    notes: list[str]
    columns: list[str]
    masks: list | None = None
    against: str = ""


def read_goal(sheet: Sheet, asked, uncertain: str, can_be_mask: bool) -> Goal:
    """Find out what is to be learnt: what --column names (`asked`), else the column of masks where
    the task may be segmentation, else the column of labels, else every column of yes and no.

    UserError when nothing can be learnt.
    """
    if asked:
        columns = asked_columns(sheet, asked)
    else:
        column = sheet.column("mask") if can_be_mask else None
        column = column or sheet.column("label")
        columns = [column] if column else []
    if len(columns) != 1:
        goal = read_answers(sheet, columns or answer_columns(sheet), uncertain)
        if not columns and len(goal.columns) > 1:
            goal.notes[0] += ": all of yes and no; --column A,B chooses"
    elif is_mask_column(sheet, columns[0], asked):
        goal = read_masks(sheet, columns[0])
    else:
        goal = read_label_column(sheet, columns[0], uncertain)
    refuse_only_yes(sheet, goal)
    rest = [name for name in sheet.others if name not in goal.columns]
    if columns and not asked:
        refuse_second_names(sheet, goal, rest)
    if rest:
        more = f" and {len(rest) - MAX_NAMED} more" if len(rest) > MAX_NAMED else ""
        goal.notes.append(f"columns not learnt: {', '.join(rest[:MAX_NAMED])}{more}")
    return goal


def refuse_second_names(sheet: Sheet, goal: Goal, others: list[str]):
    """UserError when a column that is called like a second diagnosis says a class of a row which
    the learnt column does not say there: the film would count as negative of it.
    """
    names = filter(None, [*goal.labels, goal.against])
    classes = {plain(name) for name in names if not name.isdecimal()}
    learnt = goal.columns[0]
    for name in others:
        if not tells(name, "second") or tells(name, "comment", "visit", "grade"):
            continue
        divided = {cell: re.split(r"[|;,\n]", cell) for cell in set(sheet.cells[name])}
        named = {cell: classes.intersection(map(plain, divided[cell])) for cell in divided}
        for row, truth in enumerate(goal.truth):
            if not truth:
                continue
            values = zip(goal.labels, truth, strict=True)
            found = {plain(label) for label, value in values if value} or {plain(goal.against)}
            if not named[sheet.cells[name][row]] <= found:
                why = (
                    f", a class of column {learnt}, which does not say it there: join both with | "
                    f"in one column, or say --column {learnt} or delete {name} if it is not meant"
                )
                sheet.refuse_cell(name, row, why)


def asked_columns(sheet: Sheet, asked: str) -> list[str]:
    """The columns that --column names, one or several with commas between."""
    names = asked.split(",")
    if plain(asked) in sheet.named:  # one column, with a comma in its name
        names = [asked]
    found = []
    for name in names:
        column = sheet.named.get(plain(name))
        if column is None:
            like = difflib.get_close_matches(name, sheet.cells, 1)
            hint = f"its columns are {', '.join(sheet.cells)}"
            hint = f"did you mean {like[0]}?" if like else hint
            sheet.refuse(f"no column {name}; {hint}")
        for role in ("film", "patient", "split"):
            if column == getattr(sheet, role):
                sheet.refuse(f"column {column} names the {role}, no label")
        if column in found:
            sheet.refuse(f"--column {asked} names column {column} twice")
        found.append(column)
    return found


def refuse_only_yes(sheet: Sheet, goal: Goal):
    """UserError when the columns say yes and have blanks, but never say no: many people write
    nothing where they mean no, yet a blank counts as not known.
    """
    values = set(chain(*filter(None, goal.truth)))
    blank = sum(sheet.answers(column).count(MISSING) for column in goal.columns)
    if goal.kind == "labels" and YES in values and NO not in values and blank:
        sheet.refuse(
            f"column {', '.join(goal.columns)} never says no; {blank} blank cells count as not "
            "known: write 0 where a blank means no"
        )


def read_label_column(sheet: Sheet, column: str, uncertain: str) -> Goal:
    """Read one column: of yes and no (one label), of numbers or of names of classes."""
    answers = set(sheet.answers(column))
    if answers == {MISSING}:
        sheet.refuse(f"column {column} is empty")
    if answers <= {NO, MISSING}:
        sheet.refuse(f"column {column} names no class beside {NO_WORDS}")
    if OTHER in answers and not is_of_yes_and_no(sheet, column):
        return read_classes(sheet, column, uncertain)
    return read_answers(sheet, [column], uncertain)


def is_of_yes_and_no(sheet: Sheet, column: str) -> bool:
    """Whether a column is one of yes and no though some cells say neither, which are then mistakes:
    more cells say yes than say neither, and what these say are not all numbers, hence codes.
    """
    count = Counter(sheet.answers(column))
    are_codes = all(
        whole_number(cell) is not None for cell in sheet.cells[column] if answer(cell) == OTHER
    )
    return count[YES] > count[OTHER] and not are_codes


# ---------------------------------------------------------------- columns of yes and no
def answer_columns(sheet: Sheet) -> list[str]:
    """The columns that answer yes or no.

    UserError when there is none; when at least half of a column are such answers, or some are
    words, and the others are neither codes nor amounts; or when a column of ticks and blanks, or of
    1 and 2, stands beside them: a blank or 2 may mean no.
    """
    found = []
    coded = []
    for column in sheet.others:
        cells = sheet.cells[column]
        count = Counter(sheet.answers(column))
        answers = count[YES] + count[NO] + count[UNCERTAIN]
        strays = Counter(cell for cell in cells if answer(cell) == OTHER)
        is_no_finding = tells(column, "sex", "visit", "grade")
        are_codes = is_no_finding and 1 not in strays.values()  # what stands once is a slip
        are_numbers = all(map(NO_NAMES["a number"].fullmatch, strays))
        are_amounts = are_numbers and len(strays) >= 5  # such as pack years
        is_mixed = answers >= count[OTHER] > 0 and len(cells) > 1
        if (is_mixed or has_words_beside(sheet, column)) and not (are_codes or are_amounts):
            refuse_other(sheet, column)
        if not strays and count[YES] + count[NO]:
            found.append(column)
        codes = {whole_number(cell) for cell in cells if answer(cell) is not MISSING}
        if {1, 2} <= codes <= {0, 1, 2, 8, 9} and not is_no_finding:
            coded.append(column)
    if found and coded:
        refuse_other(sheet, coded[0])
    refuse_ticks(sheet)
    if not found:
        sheet.refuse(
            "no column label or mask, and none of yes and no (1 and 0); its columns are "
            f"{', '.join(sheet.cells)}; call the one to learn label, or name it: --column NAME"
        )
    return found


def has_words_beside(sheet: Sheet, column: str) -> bool:
    """Whether a column of few kinds says yes or no in words beside others: ja (links), nein.

    A column of no, nasal and mask asks something else; so may 'normal' or a single letter do.
    """
    kinds = set(sheet.cells[column])
    if len(kinds) > 10 or tells(column, "sex", "visit", "grade", "comment"):
        return False
    words = {cell for cell in kinds if answer(cell) in (YES, NO) and len(cell) > 1}
    words = {cell for cell in words if whole_number(cell) is None and not is_negative(cell)}
    others = [cell for cell in kinds if answer(cell) == OTHER]
    first_words = (words_in(cell)[:1] for cell in others)
    is_answered = any(first and answer(first[0]) in (YES, NO) for first in first_words)
    says_yes = any(answer(word) == YES for word in words)
    return bool(words) and 1 <= len(others) <= 6 and (says_yes or is_answered)


def refuse_ticks(sheet: Sheet):
    """UserError on a column of ticks and blanks, which may mean no or not known."""
    for column in sheet.others:
        said = {cell for cell in sheet.cells[column] if answer(cell) is not MISSING}
        is_ticked = {cell.casefold() for cell in said} in ({"x"}, {"×"}, {"✓"}, {"✔"}, {"*"})
        is_finding = not tells(column, "comment", "chore")
        if is_ticked and MISSING in sheet.answers(column) and is_finding:
            advice = "write 1 and 0, or delete the column, or name those to learn: --column A,B"
            sheet.refuse(f"column {column} has {min(said)!r} and blanks: {advice}")


def refuse_other(sheet: Sheet, column: str):
    """UserError that names the first cell of a column that is no answer, if there is one."""
    answers = sheet.answers(column)
    advice = "correct it, or delete the column, or name those to learn: --column A,B"
    is_said = [cell for cell in sheet.cells[column] if answer(cell) not in (OTHER, MISSING)]
    if all(map(is_negative, is_said)):
        advice = f"correct it, or learn column {column} alone, as classes: --column {column}"
    if OTHER in answers:
        why = f", which is neither yes (1), no (0), unsure (-1) nor empty: {advice}"
        sheet.refuse_cell(column, answers.index(OTHER), why)


def read_answers(sheet: Sheet, columns: list[str], uncertain: str) -> Goal:
    """Read columns of yes and no, one label each; what is missing or uncertain is counted."""
    values = []
    missing = Counter()
    unsure = Counter()
    become = {UNCERTAIN: {"positive": YES, "negative": NO}.get(uncertain, MISSING)}
    for column in columns:
        refuse_other(sheet, column)
        answers = sheet.answers(column)
        missing[column] += answers.count(MISSING)
        unsure[column] += answers.count(UNCERTAIN)
        values.append([become.get(value, value) for value in answers])
    truth = [None if set(row) == {MISSING} else row for row in zip(*values, strict=True)]
    notes = [f"labels: column{'s' * (len(columns) > 1)} {', '.join(columns)}"]
    if len(columns) > 1 and missing.total():
        notes.append(f"missing: {counted(missing)}: they count in no loss and no AUROC")
    if unsure.total():
        fate = f"counted as {uncertain}"
        if uncertain == "ignore":
            fate = "left out (--uncertain positive or negative counts them)"
        notes.append(f"uncertain: {counted(unsure)}: {fate}")
    return Goal("labels", tuple(columns), truth, notes, columns)


def counted(count: Counter) -> str:
    """How many values of which columns."""
    each = [f"{column} {cells}" for column, cells in count.items() if cells]
    return f"{count.total()} values ({', '.join(each)})"


# ---------------------------------------------------------------- columns of names
def read_classes(sheet: Sheet, column: str, uncertain: str) -> Goal:
    """Read a column of classes, one or several per cell, or of numbers that stand for classes.

    A cell that is missing or uncertain leaves its row out. Two names of which every row has one are
    one question. UserError when the column cannot be classes.
    """
    findings, notes = read_findings(sheet, column, uncertain)
    labels = sorted(set(chain(*filter(None, findings))))
    labels.sort(key=lambda name: int(name) if name.isdecimal() else sys.maxsize)
    if not labels:
        sheet.refuse(f"column {column} names no class beside {NO_WORDS}")
    against = ""
    if len(labels) == 2 and all(found is None or len(found) == 1 for found in findings):
        if is_denial_of(labels[1], labels[0]):  # then other names, too, count as "no", not as "yes"
            labels.reverse()
        else:
            against = labels[0]
        notes.append(
            f"{labels[1]} (1) is learnt against {labels[0]} (0): each film is one of the two; "
            "should they mean yes and no, write yes and no"
        )
        labels = labels[1:]
    truth = [found if found is None else zeros_and_ones(found, labels) for found in findings]
    return Goal("labels", tuple(labels), truth, notes, [column], against=against)


def read_findings(sheet, column: str, uncertain: str, labels=()) -> tuple[list, list[str]]:
    """Read what a column of names or numbers finds → {name} per row, None: not known; notes.

    labels: of a trained model; what is called so is a class, however odd it looks.
    """
    cells = sheet.cells[column]
    unsure = [row for row, cell in enumerate(cells) if answer(cell) == UNCERTAIN]
    if unsure and uncertain != "ignore":
        why = f"which of them --uncertain {uncertain} should count; leave the cell empty"
        sheet.refuse_cell(column, unsure[0], f" among names of classes: nobody can tell {why}")
    said = {cell for cell in cells if answer(cell) not in (MISSING, UNCERTAIN)}
    are_numbers = None not in map(whole_number, said)
    read = read_column_of_numbers if are_numbers else read_column_of_names
    findings, notes = read(sheet, column, labels)
    if unsure:
        notes.append(f"uncertain: {len(unsure)} rows: left out")
    return findings, [f"labels: column {column}", *notes]


def read_column_of_numbers(sheet: Sheet, column: str, labels) -> tuple[list, list[str]]:
    """Read numbers that stand for classes; see read_findings."""
    findings = []
    for cell in sheet.cells[column]:
        is_said = answer(cell) not in (MISSING, UNCERTAIN)
        # '2.0', as pandas writes it beside blanks, is '2'.
        findings.append({str(whole_number(cell))} if is_said else None)
    refuse_no_classes(sheet, column, findings, MAX_CODES, labels)
    refuse_odd_codes(sheet, column, findings, labels)
    return findings, ["numbers are taken as classes, 0 like the others"]


def read_column_of_names(sheet: Sheet, column: str, labels) -> tuple[list, list[str]]:
    """Read names of classes, one or several per cell; see read_findings."""
    named = split_names(sheet, column)
    named, denials = take_denials(sheet, column, named, labels)
    findings, negatives = merge_spellings(named)
    refuse_no_classes(sheet, column, findings, MAX_CLASSES, labels)
    if tells(column, "comment"):
        sheet.refuse(
            f"column {column} holds comments, as its name says: these are no classes; "
            "--column NAME says what to learn, or rename the column"
        )
    notes = refuse_slips(sheet, column, named, labels)
    if denials:
        words = ", ".join(map(repr, denials))
        notes.append(f"{words}: read as no such finding, and what a row does not name as absent")
    if negatives:
        words = ", ".join(map(repr, negatives))
        notes.append(f"{words} count{'s' * (len(negatives) == 1)} as no finding")
    return findings, notes


def refuse_odd_codes(sheet: Sheet, column: str, codes, labels):
    """UserError on a number that stands for no class: one below 0, one that a single row has, or a
    usual code for missing. What is among the labels of a trained model is a class.
    """
    count = Counter(chain(*filter(None, codes)))
    odd = {code for code in count if int(code) < 0 or count[code] == 1}
    odd = odd if 2 * len(odd) < len(count) + 1 else set()  # else all may be classes
    odd |= codes_for_missing(count)
    odd.difference_update(labels)
    if odd:
        why = (
            ", a number below 0, one that no other row has, or a code for missing: if it is a "
            "class, write its name; leave the cell empty where it is missing"
        )
        sheet.refuse_cell(column, first_row(codes, odd), why)


def codes_for_missing(codes) -> set[str]:
    """The largest codes, if they look like those for missing and do not go on from the others: 9 of
    0, 1, 9; 98 and 99 of 1, 2, 98, 99; none of 0 to 9, nor where fewer than two others remain. 7
    and 8 alone may end a scale with gaps: 1, 3, 5, 7.
    """
    others = sorted(codes, key=int)
    found = set()
    while others and re.fullmatch("[789]|66+|77+|88+|9*9[789]", others[-1]):
        found.add(others.pop())
    while str(int(min(found, key=int, default="0")) - 1) in others:
        others.append(min(found, key=int))
        found.remove(others[-1])
    return found if len(others) >= 2 and not found <= {"7", "8"} else set()


def first_row(findings, names) -> int:
    """The first row that finds one of these names."""
    return next(row for row, found in enumerate(findings) if found and not names.isdisjoint(found))


def zeros_and_ones(findings, labels) -> tuple[int, ...]:
    """One 0 or 1 per label: whether it is among the findings."""
    return tuple(int(label in findings) for label in labels)


def split_names(sheet: Sheet, column: str) -> list[list[str] | None]:
    """Divide cells like 'Effusion|Mass' into names; None where nothing is said.

    | ; and line ends always divide, a comma where none of these is in the column. What else may
    join names (JOINT) divides where all parts stand alone elsewhere, and is part of a name where
    none does. UserError on a cell between the two, on a list with numbers or dashes, or on a part
    that is no class.
    """
    cells = sheet.cells[column]
    divider = r"[|;\n]" if any(re.search(r"[|;\n]", cell) for cell in cells) else COMMA
    rows = [None if is_unsaid(cell) else parts_of(cell, divider) for cell in cells]
    alone = {plain(name) for name in chain(*filter(None, rows)) if not JOINT.search(name)}
    split = []
    for row, names in enumerate(rows):
        if not names:
            split.append(names)
            continue
        refuse_unclear_list(sheet, column, row)
        divided = []
        for name in names:
            parts = JOINT.split(name)
            are_known = [plain(part) in alone for part in parts]
            if len(parts) > 1 and any(are_known) and not all(are_known):
                joint = JOINT.search(name)[0].strip()
                why = (
                    ": one finding or several? Join several with |, and spell each as elsewhere; "
                    f"write one without {joint!r}"
                )
                sheet.refuse_cell(column, row, why, name)
            divided += parts if all(are_known) else [name]
        for name in divided:
            refuse_no_name(sheet, column, row, name)
        split.append(divided)
    return split


def refuse_no_name(sheet: Sheet, column: str, row: int, name: str):
    """UserError on a name in a cell that cannot be that of a class."""
    what = what_instead(name) or ("half of a pair of brackets" if is_half(name) else "")
    if not what:
        return
    why = f", {what} and no class"
    other = next((cell for cell in sheet.cells[column] if answer(cell) == OTHER), "")
    if what == "an answer" and other:  # which may be the wrong one of the two
        why += f", beside {other[:60]!r}, which is no answer"
    sheet.refuse_cell(column, row, f"{why}: correct it, or say with --column what to learn", name)


# What may join two findings, or belong to the name of one. The commas of 135,4 and of mass (left,
# upper lobe) are none.
PLAIN = r"[^\[\](){}]"  # no bracket
OUTSIDE = rf"(?!{PLAIN}*[\])}}])"  # of brackets
COMMA = rf"(?:(?<!\d),|,(?!\d)){OUTSIDE}"
DASH = "[-\u2010-\u2015\u2212•·*]"  # hyphen to long dash, minus, bullets
JOINT = re.compile(rf"\s*(?:{COMMA}|[/\\+&]|\band\b|(?<=\s){DASH}(?=\s))\s*(?=\S)", re.IGNORECASE)
# Lists with a number or letter before the first finding and the next, or with a dash before one.
NUMBERED = re.compile(
    r"\W*(1[.):-](?!\d)|[ai][.)]).*(?<!\w)(2[.):-](?!\d)|(b|ii)[.)]).*|\W*(#1\b|①).*",
    re.DOTALL | re.IGNORECASE,
)
DASHED = re.compile(rf"(.*[|;,\n])?\s*{DASH}\s*[^\W\d].*", re.DOTALL)


def refuse_unclear_list(sheet: Sheet, column: str, row: int):
    """UserError on a cell such as '1. effusion 2. mass', on one with a dash before a finding, which
    may be a bullet or say no, or where 'no' stands before one of several: no effusion, mass.
    """
    cell = sheet.cells[column][row]
    if NUMBERED.fullmatch(cell) or DASHED.fullmatch(cell):
        why = ": a list with numbers or dashes? Join several findings with | and nothing else"
        sheet.refuse_cell(column, row, why)
    for unit in re.split(r"[|;\n]", cell):
        for part, following in pairwise(JOINT.split(unit)):
            if denied_by(part) and DENIALS.isdisjoint(words_in(following)):
                why = f": is {following!r} denied as well? Join several with |"
                sheet.refuse_cell(column, row, why)


def is_half(name: str) -> bool:
    """Whether a bracket in a name has no partner; that of '1) mild' needs none."""
    depth = 0
    for letter in re.sub(r"^\w{1,2}\)", "", name):
        depth += (letter in "([{") - (letter in ")]}")
        if depth < 0:
            return True
    return depth > 0


def take_denials(sheet: Sheet, column: str, named, labels) -> tuple[list, list[str]]:
    """Take the denials, such as 'no effusion', out of the names of each row: what they deny counts
    as absent, like all that a row does not name. → the names without the denials, the denials

    UserError when a row denies what it names; when a denial may say something else ('no change in
    effusion'); and when a row only denies what is no finding of any row, nor a label of the model:
    who writes 'no effusion' alone may not have looked for anything else.
    """
    said = set(chain(*filter(None, named)))
    denied = {name: denied_by(name) for name in said.difference(labels) if denied_by(name)}
    findings = [name for name in {*labels, *said.difference(denied)} if not is_negative(name)]
    unmatched = {}  # {denial of what no row finds: a finding that its words hold, else ""}
    for name in denied:
        if not any(is_of(other, denied[name]) for other in findings):
            unmatched[name] = next((other for other in findings if is_of(denied[name], other)), "")
    kept = []
    for row, names in enumerate(named):
        denials = sorted(denied.keys() & (names or ()))
        rest = names and [name for name in names if name not in denials]
        for name in denials:
            why = next((f" beside {other!r}" for other in rest if is_of(other, denied[name])), "")
            if unmatched.get(name):
                why = f", which may say something else than: no {unmatched[name]}"
            if why:
                sheet.refuse_cell(column, row, f"{why}: write what is meant", name)
        if denials and not rest and unmatched.keys() >= set(denials):
            why = (
                ", which no row finds: was anything else found? Write normal where nothing was, "
                "leave the cell empty where it is not known, or rename the class, without a denial"
            )
            sheet.refuse_cell(column, row, why, denials[0])
        kept.append(rest)
    return kept, sorted(denied)


def is_of(name: str, finding: str) -> bool:
    """Whether a name is a finding or a kind of it."""
    return plain(name) == plain(finding) or is_kind_of(name, finding)


# One pair of brackets around all, but not those of (left) mass (small) or of a doubt, (mass).
LIST = re.compile(rf"(?:[\[{{]|\((?=\)|.*[|;,'\"]))((?:{PLAIN}|[\[({{]{PLAIN}*[\])}}])*)[\])}}]")


def parts_of(cell: str, divider: str) -> list[str]:
    """The names of a cell; of a list as Python prints it, ['Effusion', 'Mass'], too."""
    listed = LIST.fullmatch(cell)
    if listed:
        parts = [part.strip(" '\"") for part in re.split(f"{divider}|,{OUTSIDE}", listed[1])]
        return list(filter(None, parts)) or ["none"]  # an empty list finds nothing
    parts = [part.strip(" /&,") for part in re.split(divider, cell)]
    return list(filter(None, parts))


def merge_spellings(named) -> tuple[list[set[str] | None], list[str]]:
    """Merge spellings that differ in case, spaces and the like; the most frequent one is kept.

    → the findings of each row, without the words for no finding; those words
    """
    spellings = {}
    for name in chain(*filter(None, named)):
        spellings.setdefault(plain(name), Counter())[name] += 1
    best = {key: count.most_common(1)[0][0] for key, count in spellings.items()}
    negatives = sorted(name for name in best.values() if is_negative(name))
    findings = []
    for names in named:
        is_said = names is not None
        findings.append({best[plain(n)] for n in names}.difference(negatives) if is_said else None)
    return findings, negatives


def refuse_no_classes(sheet: Sheet, column: str, findings, limit: int, labels):
    """UserError when a column has too many different values to be classes, or when most of them
    stand in one row only: ages, comments, names. The latter is no fault where a value is a trained
    model's label: its test may have few films.
    """
    count = Counter(chain(*filter(None, findings)))
    rows = sum(found is not None for found in findings)
    seldom = sum(films == 1 for films in count.values())
    has_label = not set(map(plain, labels)).isdisjoint(map(plain, count))
    is_mostly_seldom = len(count) >= 5 and 2 * seldom > len(count) and not has_label
    if len(count) > limit or (is_mostly_seldom and (2 * len(count) > rows or len(count) > 50)):
        first = ", ".join(repr(name[:40]) for name in list(count)[:3])
        sheet.refuse(
            f"column {column} has {len(count)} different values in {rows} rows (such as {first}): "
            "these are no classes; --column NAME says what to learn"
        )


def refuse_slips(sheet: Sheet, column: str, named, labels) -> list[str]:
    """UserError on a name that is another one in doubt (pneumonia?) or a part of it (left
    pneumonia), or a rare one that is a slip of the pen away from another (pneumonai): its films
    would count as negative for the other, unless both are labels of a trained model.
    → a warning of other names that hold another
    """
    first = {}  # {plain name: (its first row, as written there)}
    rows_of = {}  # {plain name: {its rows}}
    for row, names in enumerate(named):
        for name in names or ():
            first.setdefault(plain(name), (row, name))
            rows_of.setdefault(plain(name), set()).add(row)
    kinds = []
    known = set(map(plain, labels))
    for pair in combinations(sorted(rows_of, key=lambda key: -len(rows_of[key])), 2):
        (_, usual), (_, name) = map(first.get, pair)
        films, odd_films = (len(rows_of[key]) for key in pair)
        is_rare = odd_films < 3 or odd_films < 0.02 * films
        are_normal = is_negative(name), is_negative(usual)
        if all(are_normal):
            continue
        are_labels = known.issuperset(pair)
        is_same = is_same_in_doubt(name, usual) or (is_rare and is_slip(name, usual))
        if is_same and not are_labels:
            refuse_twin(sheet, column, first, rows_of, *pair)
        for held, kind in (pair, pair[::-1]):
            alone = len(rows_of[kind] - rows_of[held])  # where both stand the answer is right
            if any(are_normal) or not alone or not is_kind_of(first[kind][1], first[held][1]):
                continue
            if is_part_of(first[kind][1], first[held][1]) and not are_labels:
                refuse_twin(sheet, column, first, rows_of, held, kind)
            kinds.append(f"{first[kind][1]} ({alone} films) for {first[held][1]}")
    more = f" and {len(kinds) - 5} more" if len(kinds) > 5 else ""
    warning = f"warning: films of a kind count as negative for it: {', '.join(kinds[:5])}{more}"
    return [f"{warning}: write both, joined by |, where both hold"] if kinds else []


def refuse_twin(sheet: Sheet, column: str, first, rows_of, usual: str, odd: str):
    """UserError on the first row with a name that would be a class beside a usual one."""
    row, name = first[odd]
    beside = f" ({len(rows_of[odd])} ×) beside {first[usual][1]!r} ({len(rows_of[usual])} ×)"
    why = (
        f"{beside}, which would be two classes: write one of them, or nothing where it is not "
        "known; if both are meant, make a column of 0 and 1 of each (--column A,B)"
    )
    sheet.refuse_cell(column, row, why, name)


# ---------------------------------------------------------------- columns of masks
def is_mask_column(sheet: Sheet, column: str, asked: str | None) -> bool:
    """Whether a column names pictures of masks: its cells look like it, or its own name says so and
    --column does not ask for it.
    """
    is_called_mask = is_called(column, "mask") and not asked
    suffixes = {Path(as_path(cell)).suffix.lower() for cell in sheet.cells[column]}
    return is_called_mask or not suffixes.isdisjoint(SUFFIXES)


def read_masks(sheet: Sheet, column: str) -> Goal:
    """Read a column of mask files; an empty cell is an empty mask, 'NA' and the like leave out.

    UserError on what cannot be the name of a picture: run lengths, .npy files.
    """
    masks = []
    for row, cell in enumerate(sheet.cells[column]):
        for kind in ("run lengths", "a file"):
            if NO_NAMES[kind].fullmatch(cell):
                why = f", {kind} and no picture: save each mask as PNG and write its name"
                sheet.refuse_cell(column, row, why)
        masks.append(None if cell and answer(cell) is MISSING else cell)
    truth = [None if mask is None else () for mask in masks]
    notes = [f"masks: column {column}"]
    if masks.count(""):
        notes.append(f"masks: {masks.count('')} rows have none: their masks are empty")
    return Goal("mask", (column,), truth, notes, [column], masks)


# ---------------------------------------------------------------- a table for a trained model
def goal_of_model(sheet: Sheet, asked, uncertain, kind, labels, against="") -> Goal:
    """Find the labels of a trained model in a table: columns that are called like them, else the
    column of labels or `asked`. What the table does not tell is not known (None).
    """
    columns = {} if asked or kind == "mask" else columns_of_labels(sheet, labels)
    role = "mask" if kind == "mask" else "label"
    column = asked_columns(sheet, asked)[0] if asked else sheet.column(role)
    if kind == "mask":
        goal = Goal("mask", (), [], ["masks: no column mask"], [])
        goal = read_masks(sheet, column) if column else goal
        return goal._replace(labels=tuple(labels), truth=[()] * len(sheet.lines))
    # One of two codes such as 1 and 2 is no answer to the label "2": 1 would be its no.
    is_question = len(labels) == 1 and not labels[0].isdecimal()
    if column and is_question and not columns and OTHER not in sheet.answers(column):
        columns = {labels[0]: column}
    if columns:
        truth, notes = match_columns(sheet, columns, uncertain, labels)
    elif column:
        truth, notes = match_findings(sheet, column, uncertain, labels, against)
    else:
        truth = [(None,) * len(labels)] * len(sheet.lines)
        notes = [f"labels: no column label or {', '.join(labels)}: nothing to compare with"]
    truth = exclusive(truth) if kind == "classes" else truth
    used = list(columns.values()) or [column]
    rest = [name for name in sheet.others if name not in used]
    if rest:
        notes.append(f"columns not compared: {', '.join(rest)}")
    return Goal(kind, tuple(labels), truth, notes, used)


def columns_of_labels(sheet: Sheet, labels) -> dict[str, str]:
    """The columns that are called like labels, {label: column}.

    A column called label or class is none when it holds other names than yes and no.
    """
    found = {}
    for label in labels:
        column = sheet.named.get(plain(label))
        if column in sheet.others:
            if not is_called(column, "label") or OTHER not in sheet.answers(column):
                found[label] = column
    return found


def match_columns(sheet, columns, uncertain, labels) -> tuple[list[tuple], list[str]]:
    """Read the columns of a model's labels, {label: column} → truth, notes."""
    goal = read_answers(sheet, list(columns.values()), uncertain)
    rows = [dict(zip(columns, row, strict=True)) if row else {} for row in goal.truth]
    truth = [tuple(map(row.get, labels)) for row in rows]
    absent = [label for label in labels if label not in columns]
    if absent:
        goal.notes.append(f"not in the table: {', '.join(absent)}")
    return truth, goal.notes


def exclusive(truth: list[tuple]) -> list[tuple]:
    """Of classes that exclude each other exactly one holds, else which one is not known."""
    return [row if row.count(YES) == 1 or None in row else (None,) * len(row) for row in truth]


def match_findings(sheet, column, uncertain, labels, against) -> tuple[list, list[str]]:
    """Compare the findings of each row with a model's labels → truth, notes.

    Names that the model does not know count as none of its labels; UserError when it knows none, or
    one may be a label. Of a label and the class that it was learnt `against` a row must have one,
    else it is not known. "No finding" is a label where the model has it.
    """
    both = [*labels, against] if against else labels
    findings, notes = read_findings(sheet, column, uncertain, both)
    keys = list(map(plain, both))
    healthy = set(filter(is_negative, both))
    count = Counter(chain(*filter(None, findings)))
    others = {name: films for name, films in count.items() if plain(name) not in keys}
    refuse_likeness(sheet, column, findings, others, both)
    if count and len(others) == len(count):
        sheet.refuse(
            f"column {column} names {', '.join(list(others)[:5])}, but none of what the model was "
            f"trained for: {', '.join(labels)}; --column NAME says what to compare"
        )
    truth = []
    for found in findings:
        row = zeros_and_ones(set(map(plain, found or healthy)), keys)
        truth.append((None,) * len(both) if found is None else row)
    if against:
        truth = [row[: len(labels)] for row in exclusive(truth)]
    if others:
        words = ", ".join(f"{name} {films}" for name, films in others.items())
        notes.append(f"none of the model's labels: {words}")
    if against:
        neither = truth.count((None,))
        notes.append(f"neither {labels[0]} nor {against}, hence not judged: {neither} rows")
    return truth, notes


def refuse_likeness(sheet: Sheet, column: str, findings, others, labels):
    """UserError on a name that may be a label of the model: in doubt (label?), with a slip of the
    pen, a kind of it (left label), or the kind that it belongs to.
    """
    for name, label in product(others, labels):
        is_kind = is_kind_of(name, label) or is_kind_of(label, name)
        if is_same_in_doubt(name, label) or is_slip(name, label) or is_kind:
            why = (
                f", which may be the model's {label!r}: write that where it is meant, or nothing "
                "where it is not known; if it is something else, make a column "
                f"{label} of 0 and 1"
            )
            sheet.refuse_cell(column, first_row(findings, {name}), why, name)
