"""What finished notes say, as the tables of seed 001: classes of semanticity, and groups within heads."""

from math import isnan

from atlas.db.annotations import list_heads
from atlas.db.comparing import agreement
from atlas.db.notes import HeadAnnotation
from atlas.db.vocabulary import same_words
from atlas.judging import ClassCount, group_counts, semanticity, semanticity_table
from atlas.settings import Settings


def finished(settings: Settings, model: str, annotator: str | None = None) -> list[HeadAnnotation]:
    """The finished notes about a model's heads, in reading order."""
    return [note for note in list_heads(settings, model, annotator=annotator) if note.status == "done"]


def _table(names: tuple[str, ...], rows: list[tuple[object, ...]], title: str) -> list[str]:
    lines = [f"### {title}", "", f"| {' | '.join(names)} |", f"|{'|'.join('---' for _ in names)}|"]
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return [*lines, *(f"| {' | '.join(row)} |" for row in cells)]


def semanticity_lines(settings: Settings, model: str, annotator: str | None = None) -> list[str]:
    """How many heads are mono-, nearly mono-, bisemantic, ...: as annotators said, and as verdicts add up."""
    notes = finished(settings, model, annotator)
    same = same_words(settings, model)
    said = semanticity_table(note.semanticity for note in notes)
    told = semanticity_table(semanticity(note.verdicts, same) for note in notes)
    rows: list[tuple[object, ...]] = [
        (a.semanticity.replace("_", " "), _share(a), _share(b)) for a, b in zip(said, told, strict=True)
    ]
    return _table(("class", "as said", "from verdicts"), rows, f"Semanticity of {len(notes)} notes")


def _share(row: ClassCount) -> str:
    return f"{100 * row.share:.1f}% ({row.n}/{row.of})" if row.of else "-"


def group_lines(settings: Settings, model: str, annotator: str | None = None) -> list[str]:
    """For every head with verdicts, its groups with their counts; nothing where there are none."""
    same = same_words(settings, model)
    rows: list[tuple[object, ...]] = []
    for note in finished(settings, model, annotator):
        if note.verdicts:
            n = len(note.verdicts)
            groups = ", ".join(f"{word} {k}/{n}" for word, k in group_counts(note.verdicts, same))
            rows.append((f"L{note.layer}H{note.head}", note.annotator, groups or "-", note.label))
    return (
        _table(("head", "annotator", "groups", "label"), rows, "Groups in the top features") if rows else []
    )


def agreement_lines(settings: Settings, model: str) -> list[str]:
    """How far annotators agree on each field; nothing where no head has two finished notes."""
    rows: list[tuple[object, ...]] = [
        (
            one.field.name,
            one.units,
            one.judgements,
            *map(_number, (one.equal, one.alpha, one.cohen, one.fleiss)),
        )
        for one in agreement(settings, model)
        if one.units
    ]
    names = (
        "field",
        "units",
        "judgements",
        "equal pairs",
        "Krippendorff's alpha",
        "Cohen's kappa",
        "Fleiss' kappa",
    )
    return _table(names, rows, "Agreement") if rows else []


def _number(value: float) -> str:
    return "-" if isnan(value) else f"{value:.3f}"
