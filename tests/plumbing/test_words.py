"""Words: what columns and cells are called; each word has one meaning, everywhere."""

from itertools import combinations

import pytest

from plumbing.words import (
    COLUMNS,
    MEANT_BY,
    MISSING,
    NO,
    NO_FINDING,
    NONE_OF,
    OTHER,
    UNCERTAIN,
    WORDS,
    YES,
    answer,
    column_key,
    denied_by,
    flags_split,
    is_denial_of,
    is_kind_of,
    is_negative,
    is_same_in_doubt,
    plain,
    split_of,
    whole_number,
)


# ---------------------------------------------------------------- cells
def test_whole_numbers_may_have_a_point_or_a_comma():
    cells = ["2", "2.0", "+2,", "-9", "2.5", "2e3", "", "two"]
    assert [whole_number(cell) for cell in cells] == [2, 2, 2, -9, None, None, None, None]


def test_a_cell_answers_yes_no_perhaps_or_nothing():
    words = {
        YES: "1 1.0 1. 1,0 +1 yes Y TRUE positive Present",
        NO: "0 0.0 0,00 -0.0 no N False NEGATIVE absent",
        UNCERTAIN: "-1 -1.0 -1,0 \u22121 uncertain Equivocal",
        MISSING: "NA N/A #N/A #NV n.a. nan NaN NULL None - ? <NA> unknown",
        OTHER: "2 0.5 -2 10 1.5 M pneumonia 1|0 1e3",
    }
    for value, cells in words.items():
        assert {cell: answer(cell) for cell in cells.split()} == dict.fromkeys(cells.split(), value)
    assert answer("") is answer("  ") is MISSING
    words = {
        YES: "positiv;Sí;vorhanden;pos.;J;WAHR;VRAI;VERO",
        NO: "Não;negativ;Nein;nicht vorhanden;o.B.;no_finding;neg.;FALSCH;FAUX;FALSO",
        UNCERTAIN: "unklar;Fraglich;V.a.;v. A.;douteux",
        MISSING: "k.A.;k. A.;keine_Angabe;N.A;Keine Angabe;nicht beurteilbar;Não avaliável;fehlt",
        OTHER: "V.a. Pneumonie;kA;0-1",
    }
    more = {
        YES: "Checked",
        NO: "Unchecked;Lungs clear;Rx tórax normal;Thorax o. B.;unauff.;clear",
        UNCERTAIN: "indéterminé;Inconclusive;non concluant",
        MISSING: "(leer);(Blank);n/d;TBD;nicht auswertbar;N/K",
        OTHER: "dito;clearance;pendent",
    }
    words = {meaning: f"{words[meaning]};{more[meaning]}" for meaning in words}
    for value, cells in words.items():
        assert {answer(cell) for cell in cells.split(";")} == {value}, cells


def test_words_for_no_finding_and_spellings_of_one_name():
    for word in WORDS[NO_FINDING].split(", "):
        assert is_negative(word.upper()) and is_negative(word.replace(" ", "_"))
    for word in ("o. B.", "O.B", "Unauffällig", "unauffaellig", "Sem alterações", "RAS", "Gesund"):
        assert is_negative(word), word
    for word in ("", "Effusion", "normal?", "abnormal", "OB", "keine Pneumonie", "10", "1.0"):
        assert not is_negative(word), word
    same = ["Patient ID", "patient_id", "PATIENT-ID", "patientId", " patient  id "]
    assert len(set(map(plain, same))) == 1
    different = ["HIV", "HIV-", "HIV+", "1.5", "15"]
    assert len(set(map(plain, different))) == 5


SPLIT_SAID = {
    "train": "Trainingsdaten Trainingsset training_cohort 1_train trening eğitim 训练集 TR",
    "val": "Validierungsdaten validation-cohort 2_val walidacja doğrulama 验证集 dev",
    "test": "Testdaten Testset TEST-COHORT 3_test Testing 测试集 test",
    None: "holdout external_test Test_1 set data derivation développement Testosteron 1 valve",
}


@pytest.mark.parametrize("split", SPLIT_SAID)
def test_a_word_names_a_split_whatever_it_is_joined_with(split):
    assert {word: split_of(word) for word in SPLIT_SAID[split].split()} == dict.fromkeys(
        SPLIT_SAID[split].split(), split
    )


def test_the_name_of_a_column_of_yes_and_no_may_tell_a_split():
    flags = (
        "test_cohort holdout external_test test_flag used_for_training train_test Train? Testset"
    )
    assert all(map(flags_split, flags.split()))
    others = "test Test? valid TR Testosteron contest set flag strain"
    assert not any(map(flags_split, others.split()))


# ---------------------------------------------------------------- one list of each meaning
def test_a_denial_is_neither_the_finding_nor_a_kind_of_it():
    denials = ["nonTB", "not TB", "TB-negative", "TB neg.", "absence of TB", "TB excluded"]
    denials += ["TB nicht vorhanden", "TB not seen", "TB not present"]
    for name in denials:
        assert is_denial_of(name, "TB") and not is_denial_of("TB", name)
        assert not is_kind_of(name, "TB")
    for name in ("TB", "TB left", "gram-negative TB", "TB ohne Erguss", "drug of TB", "benign"):
        assert not is_denial_of(name, "TB")
    assert is_denial_of("HIV-", "HIV+") and not is_denial_of("HIV+", "HIV-")
    for name in ("Control", "healthy controls", "Vergleichsgruppe", "Témoins"):
        assert is_denial_of(name, "TB") and not is_denial_of("TB", name)


def test_a_word_has_one_meaning_unless_it_is_no_and_no_finding_or_none():
    for (one, words), (other, more) in combinations(MEANT_BY.items(), 2):
        assert other == NO_FINDING or words.isdisjoint(more), (one, other, words & more)
    assert MEANT_BY[NO_FINDING] & MEANT_BY[MISSING] == {"none"}
    assert MEANT_BY[NO_FINDING].isdisjoint(MEANT_BY[YES] | MEANT_BY[UNCERTAIN])


def test_a_usual_name_has_one_role_and_is_written_as_names_are_compared():
    for (one, names), (other, more) in combinations(COLUMNS.items(), 2):
        assert set(names).isdisjoint(more), (one, other)
    assert all(column_key(name) == name for names in COLUMNS.values() for name in names)


@pytest.mark.parametrize("word", WORDS[UNCERTAIN].split(", "))
def test_what_is_uncertain_as_an_answer_is_a_doubt_before_a_name(word):
    assert is_same_in_doubt(f"{word.title()} mass", "Mass")


def test_a_differential_diagnosis_is_a_doubt():
    assert is_same_in_doubt("DD Pneumonie", "Pneumonie") and not is_same_in_doubt("DDT", "T")
    assert denied_by("kein Nachweis einer Pneumonie") == "Pneumonie"


@pytest.mark.parametrize("word", NONE_OF)
def test_every_word_of_denial_denies_and_is_no_kind(word):
    name = f"{word} Pneumonie"
    assert denied_by(name) == "Pneumonie"
    assert not is_kind_of(name, "Pneumonie")
