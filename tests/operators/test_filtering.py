"""Filters: their texts, their types, and the rows they let through."""

from datetime import UTC, date, datetime

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.operators.filtering import bind, conditions_of, matching_rows, parse_where
from penstock.operators.metadata import KEEP_TYPES

NUMBERS = st.none() | st.integers(-3, 3)
RANGES = st.fixed_dictionaries({}, optional={"min": st.integers(-3, 3), "max": st.integers(-3, 3)}).filter(bool)


def mask(table: pa.Table, where: dict[str, object]) -> list[bool]:
    allowed = matching_rows(table, bind(conditions_of(where), table.schema))
    assert allowed.dtype == np.bool_ and allowed.shape == (table.num_rows,)
    return allowed.tolist()


@settings(deadline=None)
@given(
    rows=st.lists(st.tuples(NUMBERS, st.none() | st.sampled_from("abc")), max_size=12),
    cut=st.integers(0, 12),
    number=RANGES | st.lists(st.integers(-3, 3)) | st.integers(-3, 3),
    letters=st.sets(st.sampled_from("abcd")),
)
def test_masks_are_what_python_says(
    rows: list[tuple[int | None, str | None]], cut: int, number: object, letters: set[str]
) -> None:
    schema = pa.schema({"number": pa.int64(), "letter": pa.string()})
    parts = [
        pa.table([pa.array([row[column] for row in part], schema.types[column]) for column in range(2)], schema=schema)
        for part in (rows[:cut], rows[cut:])
    ]

    def meets(value: int | None) -> bool:
        if value is None:
            return False
        match number:
            case dict():
                return bool(number.get("min", -9) <= value <= number.get("max", 9))
            case list():
                return value in number
            case _:
                return value == number

    expected = [meets(value) and letter in letters for value, letter in rows]
    assert mask(pa.concat_tables(parts), {"number": number, "letter": letters}) == expected


@pytest.mark.parametrize(
    ("type_name", "stored", "wanted"),
    [
        ("int64", 2020, ["2020", 2020, 2020.0, np.int32(2020)]),
        ("float64", 0.5, ["0.5", 0.5, np.float32(0.5)]),
        ("bool", True, ["true", "1", True, np.True_]),
        ("string", "2020", ["2020", np.str_("2020")]),
        (
            "timestamp",
            datetime(2024, 5, 1, tzinfo=UTC),
            ["2024-05-01", "2024-05-01T02:00:00+02:00", date(2024, 5, 1), datetime(2024, 5, 1)],
        ),
    ],
)
def test_values_and_texts_of_them_mean_the_same(type_name: str, stored: object, wanted: list[object]) -> None:
    table = pa.table({"column": pa.array([stored, None], KEEP_TYPES[type_name])})
    for value in wanted:
        assert mask(table, {"column": value}) == [True, False]
        assert mask(table, {"column": {"min": value, "max": value}}) == [True, False]


def test_texts_of_the_command_line() -> None:
    texts = ["year >= 2020", "year<=2024", "language=en", "kind=a,b", "title=x >= y", "empty="]
    assert parse_where(texts) == {
        "year": {"min": "2020", "max": "2024"},
        "language": ["en"],
        "kind": ["a", "b"],
        "title": ["x >= y"],
        "empty": [""],
    }


@pytest.mark.parametrize("text", ["year", "=2020", "year<2020", "year!=2020", ""])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"must be column=value, column=value,value, column>=value or column<=value"):
        parse_where([text])


@pytest.mark.parametrize("texts", [["a=1", "a=2"], ["a=1", "a>=2"], ["a>=1", "a>=2"]])
def test_a_column_has_one_condition_or_two_bounds(texts: list[str]) -> None:
    with pytest.raises(ValueError, match="conditions on column a must be one, or a lower and an upper bound"):
        parse_where(texts)
