"""What people call the columns of their tables, and what the words in the cells mean.

Every such list stands here, once, in English, German, Dutch, French, Spanish, Portuguese and
Italian. Nothing here knows a table: a name or a cell goes in, and what it means comes out.
"""

import functools
import re
import unicodedata
from itertools import chain, product, takewhile
from os.path import commonprefix


# ---------------------------------------------------------------- spellings
@functools.lru_cache(100_000)
def plain(name: str) -> str:
    """The name without case, spaces, underscores and hyphens, by which names are compared."""
    return re.sub(r"(?<=\w)[\s_-]+(?=\w)|_", "", name.strip().casefold())


def column_key(name: str) -> str:
    """The name of a column as its role is looked up: plain, without dots and accents, # as nr.

    'Pat.-Nr.' is patnr, 'N° patient' npatient.
    """
    letters = unicodedata.normalize("NFKD", plain(name).replace("#", "nr"))
    return re.sub(r"\W", "", letters)


def without_accents(text: str) -> str:
    """A text in small letters without accents."""
    return re.sub(r"[\u0300-\u036f]", "", unicodedata.normalize("NFD", text.strip().casefold()))


@functools.lru_cache(100_000)
def word_of(cell: str) -> str:
    """A cell as words are compared: plain, without accents, last dots, and spaces after dots."""
    return plain(re.sub(r"(?<=\.)\s+", "", without_accents(cell))).rstrip(".")


# ---------------------------------------------------------------- columns
PERSON = "patient patienten pat subject person participant proband probanden paciente paziente"
NUMBER = "id nr num number nummer no key uid code name identifier index pseudonym"
NUMBER_OF = "id n no nr num numero number code codice nde node numerode numerodu"

# The usual names of a column, by its role, as column_key writes them; the first in a table counts.
COLUMNS = {
    "film": (
        "filename imagefilename imagefile filepath imagepath file image path imageindex imageid "
        "imagename img imgid imgname imgpath dicomid dicom dicomfile dicompath dcm film filmid "
        "dateiname datei bilddatei bild fichier nomdefichier archivo arquivo nomefile"
    ).split(),
    "mask": "mask maskfile maskfilename maskpath maskname maskimage segmentation".split(),
    "label": (
        "label labels findinglabels findinglabel findings finding class classes classname "
        "diagnosis diagnoses target targets pathology pathologies disease category groundtruth "
        "befund befunde diagnose diagnosen diagnostic diagnostico diagnosticos diagnosi referto "
        "reperto hallazgo hallazgos achado achados"
    ).split(),
    "patient": [
        *"patientid patient subjectid subject patientnumber patientno patid pid mrn".split(),
        *map("".join, product(PERSON.split(), NUMBER.split())),
        *map("".join, product(NUMBER_OF.split(), "patient paciente paziente".split())),
        *"participant proband paciente paziente pat ipp nip pseudonym pseudoid".split(),
        *"fallnummer fallnr fallid".split(),  # a stay: better than nobody
    ],
    "split": "split set fold subset partition aufteilung".split(),
}

# What any other column tells, by parts of its name.
PARTS = {
    "patient": "^pat(?!h|tern)|patient|pacient|pazient|proband|subject|participant",
    "number": (
        "^id|id$|nr$|no$|num$|nummer|number|numero|numer$|code|key|pseudo|akte|case|fall|dossier|"
        "mrn|^(nhc|hc|dni|nss|bsn|pesel)$|codicefiscale|住院|病历|病案|患者"
    ),
    "clinic number": "(hospital|klinik|clinic).*(id|nr|no|number|nummer)$|mrn",  # of a patient
    "sex": "sex|sesso|gender|geschl|genre|性别",
    "trait": (  # age, size and dates of a person
        "(?<!tri)age|alter|weight|gewicht|height|gross|size|bmi|dos[ei]|position|orient|"
        "(?<!candi)date(?!i|n)|datum|time|年龄|"
        "zeit|birth|geb|type|status|history|race|ethnic|diagn|idade|edad|^eta(del|$)|peso|poids|"
        "taille|talla|altura|estatura|year|jahr|monat|month"
    ),
    "comment": (
        "comment|kommentar|bemerk|anmerk|remar[kq]|freitext|freetext|notes?$|notiz|hinweis|"
        "observaciones|observacoes|osservazion"
    ),
    "view": (
        "(?<!re|er)view|aufnahmeart|proje[kcz]|proie|frontal|lateral(?!i)|strahlengang|inciden[zc]"
    ),
    "visit": (  # when, where and with which machine a film was taken
        "follow|visit|verlauf|site|hospital|klinik|center|centre|zentrum|ward|station|zimmer|room|"
        "scanner|device|gerat|geraet"
    ),
    "second": (  # of several diagnoses
        "neben|second(?!read)|zweit(?!les|bef)|weiter|andere|other|additional|zusatz|autre|otro|"
        "altr[oi]|(?<!reader)(?<!rater)(?<!leser)(?<!befunder)(?<!lecteur)(?<!lector)[2-9]$"
    ),
    "chore": (  # what was done with a film, often as a tick
        "check|gepr|review|done|print|exclu|ausschl|flag|consent|repeat|artefa|artifa|kontroll"
    ),
    "exam": (
        "study(?!(id|nr|no|number)$)|serie|accession|exam|untersuch|auftrag|order|image|film|bild|"
        "dicom|instance|acqui|slice|icd|annotat|technic|^rad|mtra|user|batch|^bed|bett|tube|rack|"
        "proced|departm|region|countr|postal|zip|plz|phone|telef|serial|reader|report|note|"
        "operator|befund|radiolog|proto[ck]ol|[ck]assette|dete[ck]tor|lo[ck]ali|^tnm|^ops|numberof"
    ),
    "grade": (  # codes such as 0 to 3, which are no findings either
        "view|side|seite|group|gruppe|grupo|cohort|kohorte|severity|schwere|score|quality|"
        "qualitat|smok|rauch|number|anzahl|count"
    ),
}


def is_called(column: str, role: str) -> bool:
    """Whether a column has one of the usual names of a role."""
    return column_key(column) in COLUMNS[role]


def has_other_role(name: str) -> bool:
    """Whether a class has a name by which a column of it would not be known as one."""
    return any(is_called(name, role) for role in COLUMNS) or flags_split(name)


def tells(column: str, *kinds: str) -> bool:
    """Whether a column is called like one of these kinds of PARTS."""
    return any(re.search(PARTS[kind], column_key(column)) for kind in kinds)


SPLIT_WORDS = {  # without accents; of Polish, Turkish and Chinese, too
    "train": (
        "train training tr entrainement apprentissage entrenamiento treino treinamento "
        "addestramento trening egitim 训练"
    ).split(),
    "val": (
        "val valid validate validation dev development validierung validatie validacion validacao "
        "validazione walidacja dogrulama 验证"
    ).split(),
    "test": "test testing tst teste prueba 测试".split(),
}
SPLITS = tuple(SPLIT_WORDS)
FILMS_OF_SPLIT = "set|data|daten|satz|menge|gruppe|group|cohort|kohorte|集"
SPLIT_NAME = re.compile(rf"\d*(.{{2,20}}?)(s?({FILMS_OF_SPLIT}))*")
# How a word begins that has to do with splits, though it may not tell which: external test,
# holdout, derivation; development is train to some and val to others.
SPLIT_STEMS = {
    "train": re.compile("train|entrain|apprenti|entrenam|trein|addestra|trening|egitim|训练"),
    "val": re.compile("val(s|$)|valid|walid|dogrul|验证"),
    "test": re.compile("test(s|e|d|$|ing|menge|gruppe|kohorte|cohort|group)|测试"),
    "holdout": re.compile("holdout|hold$|heldout|held$"),
    "development": re.compile("deriv|develop|entwicklung|desarrollo|dev$"),
}


def split_of(word: str) -> str | None:
    """The split that a word names: train, val or test, as 1_train and Testdaten do, too; None when
    it names none.
    """
    said = SPLIT_NAME.fullmatch(word_of(word))
    return next((split for split, words in SPLIT_WORDS.items() if said and said[1] in words), None)


def split_stem(cell: str) -> str | None:
    """The kind of SPLIT_STEMS that a word of a cell belongs to, else the split that it names."""
    words = words_in(without_accents(cell))
    for stem, pattern in SPLIT_STEMS.items():
        if any(map(pattern.match, words)):
            return stem
    return split_of(cell)


def flags_split(column: str) -> bool:
    """Whether a column of yes and no is called like a split: is_test, Testset, train, holdout.

    But a column test may be of blood, valid of the film's quality, and TR of a valve.
    """
    before, word, after = re.fullmatch(
        rf"(is|in|(?:used)?for|external|internal)?(.*?)({FILMS_OF_SPLIT}|flag|test)?",
        column_key(column),
    ).groups()
    word, after = (word, after) if word or after != "test" else (after, "")
    split = split_of(word)
    is_odd = word == "valid" or len(word) < 4
    is_told = bool(before or (after and not (is_odd and after in ("flag", "test"))))
    may_be_else = split == "test" or is_odd
    return word == "holdout" or (split is not None and (is_told or not may_be_else))


# ---------------------------------------------------------------- cells
YES = 1
NO = 0
UNCERTAIN = -1
MISSING = None
NO_FINDING = "no finding"  # NO to every label; but "none" in a column of yes and no is missing
OTHER = "other"  # no answer at all

# What the words of a cell mean, without accents. Numbers need no words.
WORDS = {
    YES: (
        "yes, y, true, positive, pos, present, ja, j, oui, si, sim, positiv, positif, positivo, "
        "vorhanden, "
        "checked, "  # REDCap's
        # true, as Excel writes it
        "wahr, waar, vrai, vero, verdadero, verdadeiro"
    ),
    NO: (
        "no, n, false, negative, neg, absent, nein, nee, non, nao, negativ, negatif, negativo, "
        "nicht vorhanden, unchecked, falsch, onwaar, faux, falso"
    ),
    UNCERTAIN: (
        "uncertain, unsure, equivocal, indeterminate, unklar, fraglich, unsicher, verdacht, v.a., "
        "v.d., incertain, douteux, dudoso, incierto, incerto, duvidoso, dubbio, inconclusive, "
        "unclear, indetermine, indéterminé, non concluant, no concluyente"
    ),
    MISSING: (
        ", na, n/a, #n/a, #nv, <na>, nan, null, none, nil, -, --, ?, missing, unknown, n.a., n.d., "
        "not available, not applicable, no data, not done, not assessed, not assessable, "
        "not known, k.a., n.b., keine angabe, keine angaben, unbekannt, nicht beurteilbar, "
        "nicht bekannt, nicht bestimmt, fehlt, fehlend, non interpretable, non renseigne, inconnu, "
        "no valorable, no evaluable, desconocido, sin datos, nao avaliavel, desconhecido, "
        "sem dados, non valutabile, sconosciuto, nicht auswertbar, pending, ausstehend, "
        "not reported, n/d, n/k, tbd, leer, (leer), (blank)"
    ),
    NO_FINDING: (
        "normal, no finding, no findings, none, negative, healthy, 0, o.b., o.p.b., ohne befund, "
        "unremarkable, within normal limits, wnl, nad, nothing abnormal detected, no abnormality, "
        "no abnormalities, no pathology, no disease, keine pathologie, "
        "keine auffälligkeit, keine auffälligkeiten, keine auffaelligkeiten, "
        "ohne auffälligkeiten, altersentsprechend, altersentsprechender befund, "
        "geen afwijkingen, pas d'anomalies, aucune particularité, sem particularidades, "
        "ohne pathologischen befund, kein befund, keine, keine befunde, "
        "kein pathologischer befund, normalbefund, unauffallig, gesund, unauffaellig, regelrecht, "
        "negativ, normale, negatif, negativo, r.a.s., ras, rien a signaler, sans anomalie, "
        "pas d'anomalie, aucune anomalie, sain, sano, sin hallazgos, sin alteraciones, "
        "sem achados, sem alteracoes, nella norma, nessun reperto, senza alterazioni, clear, "
        "unauff., bland, examen normal, rx tórax normal, thorax o.b., lungs clear, clear lungs"
    ),
}
MEANT_BY = {meaning: set(map(word_of, words.split(", "))) for meaning, words in WORDS.items()}
LATERAL_WORDS = (
    "lateral, lat, ll, rl, left lateral, right lateral, l, side, seitlich, seitl, seite, "
    "seitenaufnahme, profil, de profil, perfil, laterale, latero-lateral, laterolateral"
)
LATERAL = set(map(word_of, LATERAL_WORDS.split(", ")))
NOBODY = "anonymous anonymized anonymised anon unnamed".split()


def whole_number(cell: str) -> int | None:
    """The whole number in a cell, as '2', '2.0' or '2,0'; None when it is none."""
    is_whole = re.fullmatch(r"([+-]?\d+)([.,]0*)?", cell)
    return int(is_whole[1]) if is_whole else None


@functools.lru_cache(100_000)
def answer(cell: str):
    """Tell what a cell answers: YES, NO, UNCERTAIN, MISSING, or OTHER for what is no answer."""
    number = whole_number(cell.strip().replace("\u2212", "-"))  # the minus of typesetters
    if number in (YES, NO, UNCERTAIN):
        return number
    for meaning, words in MEANT_BY.items():
        if word_of(cell) in words:
            return NO if meaning == NO_FINDING else meaning
    return OTHER


def is_negative(name: str) -> bool:
    """Whether a name says that nothing was found: normal, none, o.B."""
    return word_of(name) in MEANT_BY[NO_FINDING]


def is_unsaid(cell: str) -> bool:
    """Whether a cell of names is missing or uncertain; 'none' is a word for no finding."""
    return answer(cell) in (MISSING, UNCERTAIN) and not is_negative(cell)


# ---------------------------------------------------------------- names of findings
# How a reader says that he is not sure, before the name; WORDS[UNCERTAIN] say so, too.
UNSURE = WORDS[UNCERTAIN].replace(".", r"\.").replace(", ", "|")
DOUBT = re.compile(
    r"[?()\[\]]|\b(possibl[ey]|probabl[ey]|likely|suspect(ed)?|susp|suspicion of|suspicious for|"
    r"presumed|questionable|query|rule out|maybe|v\.\s?[ad]|verdacht auf|dd|mögliche?[rns]?|"
    r"wahrscheinlich(e[rns]?)?|vermutlich(e[rns]?)?|suspicion de|douteuse|posible|sospecha de|"
    r"dudosa|possível|provável|suspeita de|possibile|probabile|sospett[oa]( di)?|"
    rf"({UNSURE})(e[rns]?)?)\b\.?",
    re.IGNORECASE,
)
# How he says that it was once, which is a doubt about today.
HISTORY = re.compile(
    r"\b(old|former|prior|previous|healed|status post|state after|s/p|st\.\s?p|history of|h/o|"
    r"z\.\s?n|zustand nach|alte[rns]?|frühere[rns]?|abgelaufene[rns]?|état après|"
    r"antécédents? de|ancien(ne)?|antecedentes? de|antigu?[oa]|vecchi[oa])\b\.?",
    re.IGNORECASE,
)
# How he says that there is none, before the name of a finding.
NONE_OF = (
    "no without kein keine keinen keiner keines ohne geen zonder sans pas aucun aucune sin sem "
    "senza nessun nessuna"
).split()
# These may belong to the name as well: non-displaced fracture.
DENIALS = {*NONE_OF, "non", "not", "nicht"}
# What else beside a name says that there is none: HIV negative, absence of pneumonia.
ABSENT = set(
    "negative neg negativ negatif negativo absent absence absente ausencia ausente assente "
    "excluded ausgeschlossen".split()
)
# What a denial after a name may hold: Pneumonie nicht vorhanden, mass not seen.
SEEN = set(
    "seen present visible evident found detected vorhanden nachweisbar nachgewiesen sichtbar "
    "erkennbar".split()
)
# Those without the finding of a study, where a column has two names.
CONTROLS = (
    "control controls controlgroup healthycontrol healthycontrols kontrolle kontrollen "
    "kontrollgruppe vergleichsgruppe controlegroep temoin temoins controles controlli"
).split()
DENIAL = re.compile(
    rf"({'|'.join(NONE_OF)})[\s_-]+"
    r"((evidence|signs?) (of|for) |(nachweis|hinweise?|anhalt|zeichen) (auf|für|von|eine[rs]?) |"
    r"de |d['’])?"
    r"(?P<finding>[^\W\d_].*)",
    re.IGNORECASE,
)
# Which side, part or degree of a finding is meant: no other finding.
PLACE = re.compile(
    r"(left|right|bilateral|both|sided?|upper|lower|lobe|in|on|the|of|[rl][uml]l|l|r|li|re|bds|bil|"
    r"link|recht|(links|rechts|beid)seit(ig)?|[oum]l|(ober|unter|mittel)lappen|im|gauche|droite?|"
    r"bilatéral|izquierd[oa]|derech[oa]|esquerd[oa]|direit[oa]|sinistr[oa]|destr[oa]|small|large|"
    r"mild|moderate|severe|minimal|slight|marked|gering(gradig)?|klein|gross|leicht|mässig|"
    r"deutlich|ausgeprägt|massiv|schwer)(s|e[rnms]?)?"
)

# What is left of letters that were saved in one encoding and read in another: the sign for a letter
# that is none, UTF-8 taken for Western (cp1252); and of those that an encoding has not.
GARBLED = re.compile("\ufffd|[ÃÂ][\u0080-\u00bf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ]|â€")
LOST = re.compile(r"\?\?|[^\W\d_]\?[^\W\d_]")

# What a formula leaves that failed, in any language, and a column that was too narrow.
SHEET_ERROR = re.compile(r"#\w[\w/]*[!?]|#+")
NO_NAMES = {
    "a doubt": DOUBT,
    "a ditto": re.compile(r"ditt?o|idem|(wie|siehe) oben|(as|see) above|[″〃\"]", re.IGNORECASE),
    "a sign": re.compile(r"[+±\u2013\u2212-]+"),
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


@functools.lru_cache(100_000)
def what_instead(name: str) -> str:
    """What a name is, where it is no name of a finding; else ""."""
    if is_negative(name):
        return ""
    if answer(name) != OTHER:
        return "an answer"
    return next((what for what, pattern in NO_NAMES.items() if pattern.fullmatch(name)), "")


def is_same_in_doubt(one: str, other: str) -> bool:
    """Whether two names say the same when words of doubt and of history, question marks and
    brackets go.
    """
    names = (HISTORY.sub(" ", DOUBT.sub(" ", name)) for name in (one, other))
    bare, other_bare = (plain(" ".join(name.split())) for name in names)
    return bare == other_bare != ""


@functools.lru_cache(100_000)
def denied_by(name: str) -> str:
    """The finding that a name denies: of 'no effusion' effusion; of any other name "".

    With a second denial it is a name again: No Lung Opacity / Not Normal.
    """
    denial = DENIAL.fullmatch(name)
    finding = denial["finding"] if denial else ""
    is_name = is_negative(name) or not DENIALS.isdisjoint(words_in(finding))
    return "" if is_name else finding


@functools.lru_cache(100_000)
def words_in(name: str) -> tuple[str, ...]:
    """The words and numbers of a name, in small letters."""
    return tuple(re.findall(r"[^\W_]+", name.casefold()))


def words_beside(name: str, usual: str) -> tuple[list[str], list[str]] | None:
    """The words before and after a usual name that a longer one holds: of 'old mass, left' beside
    mass [old], [left].

    Of a compound its first part counts as a word: of Pleuraerguss beside Erguss [pleura], [].
    None where the name does not hold the usual one: Massive and Pseudomass hold no mass, HIV- no
    HIV+.
    """
    if {name[-1:], usual[-1:]} == {"+", "-"}:
        return None
    words, usual = (" ".join(words_in(text)) for text in (name, usual))
    held = re.search(rf"\b(?!pseudo)(\w{{3,}})?{re.escape(usual)}(s|es|e|n|en)?\b", words)
    if not held or not usual:
        return None
    before = [*words[: held.start()].split(), *filter(None, [held[1]])]
    return before, words[held.end() :].split()


def is_kind_of(name: str, usual: str) -> bool:
    """Whether a name holds another and does not deny it: Pneumonie li., Pleuraerguss, Pneumonie
    ohne Erguss, but not keine Pneumonie, abnormal or Pseudotumor.
    """
    beside = words_beside(name, usual)
    return beside is not None and DENIALS.isdisjoint(beside[0]) and not is_denial_of(name, usual)


def is_denial_of(name: str, usual: str) -> bool:
    """Whether a name says no more than that another is not there: non-COVID, TB negative, HIV-,
    TB not seen, controls.
    """
    if word_of(name) in CONTROLS:
        return True
    if plain(name) in [word + plain(usual) for word in DENIALS]:
        return True
    if name[-1:] in ("-", "\u2013", "\u2212") and usual[-1:] == "+":
        return plain(name[:-1]) == plain(usual[:-1])
    rest = set(chain(*(words_beside(name, usual) or ()))) - {"of", "de", "for"}
    rest -= SEEN if rest & DENIALS else set()
    return bool(rest) and rest <= DENIALS | ABSENT


def is_part_of(name: str, usual: str) -> bool:
    """Whether a name is another in the plural, on one side, in one place, of one degree or without
    a third: Pneumonie li., small effusions, mass without effusion.
    """
    beside = words_beside(name, usual)
    if beside is None or all(map(PLACE.fullmatch, words_in(usual))):
        return False
    after = takewhile(lambda word: word not in DENIALS, beside[1])
    return all(map(PLACE.fullmatch, chain(beside[0], after)))


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


# ---------------------------------------------------------------- patients
def patient_of(cell: str) -> str | None:
    """The patient whom a cell names, None for nobody ('nan', blank, anonymous); of a number without
    the zeros before it and behind its point: '013', '13' and Excel's '13.0' are one patient.
    """
    if answer(cell) is MISSING or plain(cell) in NOBODY:
        return None
    number = whole_number(cell)
    return cell if number is None else str(number)


def patient_keys(patients) -> list[str | None]:
    """What the spellings of one patient have in common: P-0118, P 0118 and p118 are one; 1-12 and
    11-2 are two, unless 112 is there as well, which may be either. None of nobody (None).
    """
    # Zeros before a number do not tell.
    parts = [re.findall(r"0*(\d+)|([^\W\d_]+)", (who or "").casefold()) for who in patients]
    parts = [["".join(part) for part in found] for found in parts]
    undivided = {
        "".join(words) for words, who in zip(parts, patients, strict=True) if who and who.isalnum()
    }
    return [
        "".join(words) if "".join(words) in undivided else "-".join(words) or who
        for words, who in zip(parts, patients, strict=True)
    ]


def looks_like_patient(column: str, cells) -> bool:
    """Whether a column of no known name seems to say whose films are: it is called like a patient,
    or holds codes such as P013, or numbers under a name such as 'Aktennr.', some of them again.
    Hospital No counts patients, a column hospital or exam no does not.

    Numbers alone do not tell: widths in px, doses and leucocytes are many and repeat, too.
    """
    said = [cell for cell in cells if answer(cell) is not MISSING]
    kinds = len({cell.casefold() for cell in said})
    if kinds < 5 or tells(column, "sex", "trait", "comment"):
        return False
    are_numbers = None not in map(whole_number, said)
    if tells(column, "patient"):
        is_text = max(len(cell.split()) for cell in said) > 3
        return are_numbers or not (is_text or all(map(what_instead, said)))
    are_codes = all(re.fullmatch(r"(?=.*\d)[^\W\d][\w-]*", cell) for cell in said)
    is_id = are_codes or (are_numbers and tells(column, "number"))
    if not is_id or kinds == len(said) or tells(column, "exam"):
        return False
    if tells(column, "visit") and not tells(column, "clinic number"):
        return False
    begin_with_p = are_codes and all(cell[0] in "Pp" for cell in said)
    is_likely = begin_with_p or column_key(column) in ("id", "recordid")
    return kinds > len(said) / (5 if is_likely else 3)  # so many films of a patient, on average
