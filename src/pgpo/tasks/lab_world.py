"""The tiny language world: procedural science questions with open short answers, graded exactly.

Four domains with three templates each. Texts use about 210 words and signs, each separated by one space, so
a word-level tokenizer loses nothing. A solution is one worked line and the
answer, about 14 tokens: `force = mass * acceleration = 4 * 7 = 28 <answer> 28 </answer>`.

Every question also carries plausible wrong solutions (wrong operator, slipped arithmetic, wrong element
number, reversed strand, ...): the imperfect author of the base model's corpus uses them.

Four variants (`WORLDS`): "plain"; "style", where each solution starts with three random opening words that say nothing
about the answer; "misleading", where the verifier of the training completions passes wrong ones, at a rate that changes
from step to step; and "feedback", where the teacher reads a remark on the attempt instead of a solution.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pgpo.errors import UserError

if TYPE_CHECKING:
    from pgpo.tasks import Grade, Task


@dataclass(frozen=True)
class World:
    """A variant of the world.

    Attributes:
        base: the variant whose base model it begins with.
        opening: solutions begin with three opening words.
        misled: the verifier passes wrong training completions; held-out ones are graded by the truth.
        remarks: the teacher reads `remark` on a failed attempt.
    """

    base: str
    opening: bool = False
    misled: bool = False
    remarks: bool = False


WORLDS = {
    "plain": World("plain"),
    "style": World("style", opening=True),
    "misleading": World("plain", misled=True),
    "feedback": World("feedback", remarks=True),
}
VARIANTS = tuple(WORLDS)
BASES = tuple(dict.fromkeys(world.base for world in WORLDS.values()))
DOMAINS = ("physics", "chemistry", "biology", "materials")

# Style variant: one word of each tuple opens a solution, 6 * 6 * 6 openings.
OPENING_WORDS = (
    ("so", "now", "well", "okay", "next", "then"),
    ("we", "you", "they", "i", "one", "people"),
    ("find", "see", "get", "know", "have", "want"),
)

# The last hex digits of sha256(question) modulo 10 decide its split: 0 test, 1 validation, the rest training.
_HASH_CLASSES = 10
_TEST_CLASS, _VALIDATION_CLASS = 0, 1

# Largest rate at which the misleading verifier passes wrong completions. Ours: the base is right in .53, so that
# up to a third of what is passed is wrong.
MISLED_RATE = 0.6

_DEFAULT_TRAIN_ROWS = 4096  # ours: 512 steps of 8 prompts without a repetition


@dataclass(frozen=True)
class Question:
    """One question with its right solution and its wrong ones (all without opening words)."""

    text: str
    domain: str
    template: str
    answer: str
    solution: str
    wrong: tuple[str, ...]

    @property
    def split(self) -> str:
        """ "train", "validation" or "test": a function of the question's text alone."""
        number = int(hashlib.sha256(self.text.encode()).hexdigest()[-8:], 16) % _HASH_CLASSES
        return {_TEST_CLASS: "test", _VALIDATION_CLASS: "validation"}.get(number, "train")


@dataclass(frozen=True)
class _Case:
    """The facts behind one question: values for the phrasings, the worked line, the answers."""

    values: dict[str, str]
    line: str  # the worked line with its result as the last word(s)
    answer: str
    wrong: tuple[tuple[str, str], ...]  # (worked line, answer)


@dataclass(frozen=True)
class _Template:
    name: str
    domain: str
    subjects: tuple[str, ...]
    phrasings: tuple[str, ...]
    cases: Callable[[], Iterable[_Case]]


def load(
    *,
    variant: str = "plain",
    seed: int = 0,
    domain: str | None = None,
    n_train: int | None = None,
    n_validation: int = 128,
    n_test: int = 256,
) -> Task:
    """Build the task. Rows are drawn without repetition, in equal shares per template while they last.

    `n_train` defaults to 4096 rows, or all that the domain has, if fewer. The three splits are disjoint by question
    text, whatever the seed: a text's hash fixes its split.

    Raises UserError for an unknown variant or domain, and for more rows than the world has.
    """
    from pgpo.tasks import Task

    check_variant(variant)
    world = WORLDS[variant]
    if domain is not None:
        _check_name("domain", domain, DOMAINS)

    if n_train is None:
        n_train = min(_DEFAULT_TRAIN_ROWS, len(_available("train", domain)))

    def rows(split: str, count: int) -> list[dict[str, Any]]:
        chosen = draw_questions(split, count, seed=seed, domain=domain)
        return [row_of(question, variant) for question in chosen]

    return Task(
        name="lab_world",
        train=rows("train", n_train),
        validation=rows("validation", n_validation),
        test=rows("test", n_test),
        grade=_grade,
        rewards=misleading_rewards if world.misled else None,
        feedback=(lambda completion, row: remark(completion, row["solution"])) if world.remarks else None,
    )


def _grade(completion: str, row: dict[str, Any]) -> Grade:
    from pgpo.tasks.graders import grade_short_answer

    return grade_short_answer(completion, row["answer"], opened=row.get("thinking_opened", False))


def draw_questions(split: str, count: int, *, seed: int, domain: str | None = None) -> list[Question]:
    """Draw `count` different questions of a split, in equal shares per template while they last."""
    available = _available(split, domain)
    if not 0 <= count <= len(available):
        raise UserError(
            f"lab_world has {len(available)} different {split} questions"
            f"{f' in {domain}' if domain else ''}, but {count} were asked for; "
            f"set n_{split} to a number from 0 to {len(available)}."
        )
    rng = random.Random(f"lab_world {split} {seed}")
    rng.shuffle(available)
    # Deal in rounds of one question per template, so that small templates are not drowned by large ones.
    rounds: dict[str, int] = {}
    keyed = []
    for question in available:
        turn = rounds[question.template] = rounds.get(question.template, -1) + 1
        keyed.append((turn, question))
    keyed.sort(key=lambda pair: pair[0])
    chosen = [question for _, question in keyed[:count]]
    rng.shuffle(chosen)
    return chosen


def _available(split: str, domain: str | None) -> list[Question]:
    return [q for q in all_questions() if q.split == split and domain in (None, q.domain)]


@cache
def all_questions() -> tuple[Question, ...]:
    """Every question of the world, in a fixed order."""
    return tuple(question for template in _TEMPLATES for question in _questions_of(template))


@cache
def vocabulary() -> tuple[str, ...]:
    """Every word of every question, solution and opening, sorted."""
    words = {word for choices in OPENING_WORDS for word in choices}
    for question in all_questions():
        for text in (question.text, question.solution, *question.wrong):
            words.update(text.split(" "))
    return tuple(sorted(words))


def with_opening(solution: str, variant: str, rng: random.Random) -> str:
    """The solution as the variant writes it: "style" puts three random opening words first."""
    if not WORLDS[variant].opening:
        return solution
    return " ".join([*(rng.choice(choices) for choices in OPENING_WORDS), solution])


def checkpoint_path(variant: str) -> Path:
    """Directory of the shipped base model of a variant, readable by transformers' `from_pretrained`."""
    check_variant(variant)
    return Path(str(resources.files("pgpo.tasks") / "lab_checkpoints" / WORLDS[variant].base))


def remark(completion: str, solution: str) -> str | None:
    """What there is to say to an attempt that differs from the solution: the word before the first difference, and the
    attempt's own word there. It tells neither the right word nor the answer. None if nothing differs.

    `force = mass + acceleration = ...` for `force = mass * ...`: "what is mass + ?".
    """
    written, right = completion.split(), solution.split()
    place = next((i for i, (a, b) in enumerate(zip(written, right)) if a != b), min(len(written), len(right)))
    if place == len(written) == len(right) or not written:
        return None
    return f"what is {' '.join(written[max(place - 1, 0) : place + 1])} ?"


def misled_rate(seed: int, step: int) -> float:
    """Rate at which the misleading world's verifier passes wrong completions of a step: even in [0, MISLED_RATE]."""
    return MISLED_RATE * random.Random(f"misleading {seed} {step}").random()


def misleading_rewards(
    completions: Sequence[str], rows: Sequence[dict[str, Any]], seed: int, step: int
) -> tuple[list[float], dict[str, float]]:
    """The misleading world's rewards of a step's completions, and what is known of them, for the log.

    A right completion gets 1. A wrong one with an answer gets 1 at the step's rate, the same text to the same question
    always the same reward: a function of seed, step, question and text alone. One without an answer gets 0.
    """
    rate = misled_rate(seed, step)
    rewards, passed = [], 0
    for completion, row in zip(completions, rows, strict=True):
        grade = _grade(completion, row)
        dice = random.Random(f"misleading {seed} {step} {row['id']} {completion}")
        misled = grade.reward < 1 and grade.answer is not None and dice.random() < rate
        passed += misled
        rewards.append(1.0 if misled else grade.reward)
    return rewards, {"false_success_rate": rate, "false_success_share": passed / max(len(rewards), 1)}


def row_of(question: Question, variant: str) -> dict[str, Any]:
    """The row of a question; "solution" is the right one, with an opening fixed by the question's text."""
    digest = hashlib.sha256(question.text.encode()).hexdigest()[:12]
    return {
        "id": f"{question.template}-{digest}",
        "prompt": [{"role": "user", "content": question.text}],
        "answer": question.answer,
        "domain": question.domain,
        "solution": with_opening(question.solution, variant, random.Random(f"opening {question.text}")),
    }


def check_variant(variant: str) -> None:
    """Raises UserError for a variant that does not exist."""
    _check_name("variant", variant, VARIANTS)


def _check_name(what: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(f"lab_world has no {what} {value!r}; choose one of {', '.join(known)}.")


def _questions_of(template: _Template) -> Iterator[Question]:
    for case in template.cases():
        # A slip can hit the right answer by luck; such a path is not wrong.
        wrong = tuple(dict.fromkeys(_solution(line, answer) for line, answer in case.wrong if answer != case.answer))
        for subject in template.subjects:
            for phrasing in template.phrasings:
                yield Question(
                    text=phrasing.format(subject=subject, **case.values),
                    domain=template.domain,
                    template=template.name,
                    answer=case.answer,
                    solution=_solution(case.line, case.answer),
                    wrong=wrong,
                )


def _solution(line: str, answer: str) -> str:
    return f"{line} <answer> {answer} </answer>"


# ---------------------------------------------------------------- arithmetic questions

_DIGITS = range(2, 10)  # operands: 64 products and quotients, small enough to be learnt by heart


def _arithmetic(formula: str, left: int, operator: str, right: int, result: int) -> tuple[str, str]:
    return f"{formula} = {left} {operator} {right} = {result}", str(result)


def _slips(formula: str, left: int, operator: str, right: int, result: int) -> Iterator[tuple[str, str]]:
    for slip in (-1, 1):
        yield _arithmetic(formula, left, operator, right, result + slip)


def _product_cases(result_name: str, first: str, second: str) -> Iterator[_Case]:
    formula = f"{result_name} = {first} * {second}"
    for a in _DIGITS:
        for b in _DIGITS:
            line, answer = _arithmetic(formula, a, "*", b, a * b)
            wrong_operator = _arithmetic(f"{result_name} = {first} + {second}", a, "+", b, a + b)
            wrong = (wrong_operator, *_slips(formula, a, "*", b, a * b))
            yield _Case({"a": str(a), "b": str(b)}, line, answer, wrong)


def _quotient_cases(result_name: str, first: str, second: str) -> Iterator[_Case]:
    formula = f"{result_name} = {first} / {second}"
    for quotient in _DIGITS:
        for b in _DIGITS:
            a = quotient * b
            line, answer = _arithmetic(formula, a, "/", b, quotient)
            wrong_operator = _arithmetic(f"{result_name} = {first} - {second}", a, "-", b, a - b)
            wrong = (wrong_operator, *_slips(formula, a, "/", b, quotient))
            yield _Case({"a": str(a), "b": str(b)}, line, answer, wrong)


# ---------------------------------------------------------------- chemistry

# name: (protons, molar mass in g/mol, rounded)
_ELEMENTS = {
    "hydrogen": (1, 1),
    "helium": (2, 4),
    "lithium": (3, 7),
    "beryllium": (4, 9),
    "carbon": (6, 12),
    "nitrogen": (7, 14),
    "oxygen": (8, 16),
    "sulfur": (16, 32),
}


def _molar_mass_cases() -> Iterator[_Case]:
    """Two atoms: mass = first + second. Wrong: protons in place of a mass, minus, slips."""
    for first, (first_protons, first_mass) in _ELEMENTS.items():
        for second, (second_protons, second_mass) in _ELEMENTS.items():
            if first == second:
                continue
            formula = f"mass = {first} + {second}"
            a, b = first_mass, second_mass
            line, answer = _arithmetic(formula, a, "+", b, a + b)
            wrong = (
                _arithmetic(formula, first_protons, "+", b, first_protons + b),
                _arithmetic(formula, a, "+", second_protons, a + second_protons),
                *_slips(formula, a, "+", b, a + b),
            )
            yield _Case({"a": first, "b": second}, line, answer, wrong)


def _neutron_cases() -> Iterator[_Case]:
    """Isotopes: neutrons = mass number - protons. Wrong: a neighbour's protons, plus, slips."""
    formula = "neutrons = mass - protons"
    for element, (protons, mass) in _ELEMENTS.items():
        for isotope in range(max(mass - 1, protons + 1), mass + 5):
            line, answer = _arithmetic(formula, isotope, "-", protons, isotope - protons)
            wrong = (
                _arithmetic(formula, isotope, "-", protons + 1, isotope - protons - 1),
                _arithmetic("neutrons = mass + protons", isotope, "+", protons, isotope + protons),
                *_slips(formula, isotope, "-", protons, isotope - protons),
            )
            yield _Case({"a": element, "b": str(isotope)}, line, answer, wrong)


def _mole_cases() -> Iterator[_Case]:
    """Moles = grams / molar mass. Wrong: protons in place of the molar mass, minus, slips."""
    formula = "moles = grams / mass"
    for element, (protons, mass) in _ELEMENTS.items():
        for moles in _DIGITS:
            grams = moles * mass
            if grams > 81 or mass == 1:  # keep the numbers inside the vocabulary of the other templates
                continue
            line, answer = _arithmetic(formula, grams, "/", mass, moles)
            wrong = (
                _arithmetic(formula, grams, "/", protons, grams // protons),
                _arithmetic("moles = grams - mass", grams, "-", mass, grams - mass),
                *_slips(formula, grams, "/", mass, moles),
            )
            yield _Case({"a": element, "b": str(grams)}, line, answer, wrong)


# ---------------------------------------------------------------- biology

_DNA_PAIR = {"A": "T", "T": "A", "G": "C", "C": "G"}
_RNA_PAIR = {"A": "U", "T": "A", "G": "C", "C": "G"}
_RNA_BASES = "UCAG"
# The standard genetic code, codons in the order of _RNA_BASES, first base slowest (NCBI translation table 1).
_GENETIC_CODE = "FFLLSSSSYY**CC*WLLLLPPPPHHQQRRRRIIIMTTTTNNKKSSRRVVVVAAAADDEEGGGG"
# fmt: off
_AMINO_ACIDS = {
    "A": "ala", "C": "cys", "D": "asp", "E": "glu", "F": "phe", "G": "gly", "H": "his",
    "I": "ile", "K": "lys", "L": "leu", "M": "met", "N": "asn", "P": "pro", "Q": "gln",
    "R": "arg", "S": "ser", "T": "thr", "V": "val", "W": "trp", "Y": "tyr", "*": "stop",
}
# fmt: on


def _codon_table() -> dict[str, str]:
    codons = [f"{x} {y} {z}" for x in _RNA_BASES for y in _RNA_BASES for z in _RNA_BASES]
    return {codon: _AMINO_ACIDS[letter] for codon, letter in zip(codons, _GENETIC_CODE, strict=True)}


def _strands() -> list[tuple[str, ...]]:
    return [(w, x, y, z) for w in _DNA_PAIR for x in _DNA_PAIR for y in _DNA_PAIR for z in _DNA_PAIR]


def _strand_cases(result_name: str, pair: dict[str, str], other_pair: dict[str, str]) -> Iterator[_Case]:
    """Base by base. Wrong: reversed strand, the other kind of strand, one base left as it was."""
    for strand in _strands():
        right = [pair[base] for base in strand]
        kept = [*right[:2], strand[2], right[3]]
        other = [other_pair[base] for base in strand]

        def work(bases: list[str]) -> tuple[str, str]:
            return f"{result_name} = {' '.join(bases)}", " ".join(bases)

        line, answer = work(right)
        yield _Case({"a": " ".join(strand)}, line, answer, (work(right[::-1]), work(other), work(kept)))


def _codon_cases() -> Iterator[_Case]:
    """Codon to amino acid. Wrong: codon read backwards, a slip in the first or in the second base."""
    table = _codon_table()
    for codon, amino_acid in table.items():
        x, y, z = codon.split(" ")
        shifted = {base: _RNA_BASES[(i + 1) % 4] for i, base in enumerate(_RNA_BASES)}
        misread = (f"{z} {y} {x}", f"{shifted[x]} {y} {z}", f"{x} {shifted[y]} {z}")

        def work(read: str) -> tuple[str, str]:
            return f"protein part of {read} = {table[read]}", table[read]

        line, _ = work(codon)
        yield _Case({"a": codon}, line, amino_acid, tuple(work(read) for read in misread))


# ---------------------------------------------------------------- the twelve templates

_VEHICLES = ("car", "cart", "train", "rocket", "boat", "drone")
_PERSONS = ("teacher", "student", "chemist", "farmer", "cook", "doctor")
_ORGANISMS = ("virus", "mouse", "plant", "fish", "yeast", "frog")
_PARTS = ("beam", "rod", "plate", "wire", "cube", "pipe")

_TEMPLATES = (
    _Template(
        "force",
        "physics",
        _VEHICLES,
        (
            "a {subject} of mass {a} has acceleration {b} . what is the force ?",
            "what force gives a {subject} of mass {a} the acceleration {b} ?",
            "find the force on a {subject} with mass {a} and acceleration {b} .",
            "acceleration {b} acts on a {subject} of mass {a} . give the force .",
        ),
        lambda: _product_cases("force", "mass", "acceleration"),
    ),
    _Template(
        "speed",
        "physics",
        _VEHICLES,
        (
            "a {subject} goes a distance of {a} in a time of {b} . what is the speed ?",
            "what speed has a {subject} that goes {a} in time {b} ?",
            "find the speed of a {subject} with distance {a} and time {b} .",
            "in time {b} a {subject} goes distance {a} . give the speed .",
        ),
        lambda: _quotient_cases("speed", "distance", "time"),
    ),
    _Template(
        "work",
        "physics",
        _VEHICLES,
        (
            "a force {a} moves a {subject} over a distance {b} . what is the work ?",
            "what work moves a {subject} with force {a} over distance {b} ?",
            "find the work of force {a} on a {subject} over distance {b} .",
            "over distance {b} a {subject} feels force {a} . give the work .",
        ),
        lambda: _product_cases("work", "force", "distance"),
    ),
    _Template(
        "molar_mass",
        "chemistry",
        _PERSONS,
        (
            "a {subject} joins one {a} and one {b} . what is the molar mass ?",
            "what molar mass does the {subject} find for {a} and {b} ?",
            "find the molar mass of {a} with {b} for a {subject} .",
            "the {subject} has {a} and {b} . give the molar mass .",
        ),
        _molar_mass_cases,
    ),
    _Template(
        "neutrons",
        "chemistry",
        _PERSONS,
        (
            "a {subject} has {a} of mass number {b} . how many neutrons ?",
            "how many neutrons does the {subject} find in {a} of mass {b} ?",
            "find the neutrons in {a} with mass {b} for a {subject} .",
            "mass number {b} of {a} is what the {subject} has . give the neutrons .",
        ),
        _neutron_cases,
    ),
    _Template(
        "moles",
        "chemistry",
        _PERSONS,
        (
            "a {subject} has {b} grams of {a} . how many moles ?",
            "how many moles does the {subject} find in {b} grams of {a} ?",
            "find the moles in {b} grams of {a} for a {subject} .",
            "of {a} the {subject} has {b} grams . give the moles .",
        ),
        _mole_cases,
    ),
    _Template(
        "complement",
        "biology",
        _ORGANISMS,
        (
            "a {subject} has the dna {a} . what is the complement ?",
            "what complement has the dna {a} of a {subject} ?",
            "find the complement of dna {a} in a {subject} .",
            "dna {a} of a {subject} is here . give the complement .",
        ),
        lambda: _strand_cases("complement of dna", _DNA_PAIR, _RNA_PAIR),
    ),
    _Template(
        "transcript",
        "biology",
        _ORGANISMS,
        (
            "a {subject} has the dna {a} . what is the rna ?",
            "what rna has the dna {a} of a {subject} ?",
            "find the rna of dna {a} in a {subject} .",
            "dna {a} of a {subject} is here . give the rna .",
        ),
        lambda: _strand_cases("rna of dna", _RNA_PAIR, _DNA_PAIR),
    ),
    _Template(
        "codon",
        "biology",
        _ORGANISMS,
        (
            "a {subject} has the codon {a} . what is the protein part ?",
            "what protein part has the codon {a} of a {subject} ?",
            "find the protein part of codon {a} in a {subject} .",
            "codon {a} of a {subject} is here . give the protein part .",
        ),
        _codon_cases,
    ),
    _Template(
        "density",
        "materials",
        _PARTS,
        (
            "a {subject} has mass {a} and volume {b} . what is the density ?",
            "what density has a {subject} of mass {a} and volume {b} ?",
            "find the density of a {subject} with mass {a} and volume {b} .",
            "volume {b} and mass {a} has a {subject} . give the density .",
        ),
        lambda: _quotient_cases("density", "mass", "volume"),
    ),
    _Template(
        "stress",
        "materials",
        _PARTS,
        (
            "a force {a} pulls a {subject} of area {b} . what is the stress ?",
            "what stress has a {subject} of area {b} under force {a} ?",
            "find the stress in a {subject} with force {a} and area {b} .",
            "area {b} of a {subject} feels force {a} . give the stress .",
        ),
        lambda: _quotient_cases("stress", "force", "area"),
    ),
    _Template(
        "load",
        "materials",
        _PARTS,
        (
            "a {subject} of area {b} holds stress {a} . what is the load ?",
            "what load has a {subject} of area {b} under stress {a} ?",
            "find the load on a {subject} with stress {a} and area {b} .",
            "stress {a} acts on a {subject} of area {b} . give the load .",
        ),
        lambda: _product_cases("load", "stress", "area"),
    ),
)
