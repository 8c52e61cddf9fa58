"""Reads the tables that the benchmarks print."""

#: The quickest runs.
TINY = ["--model_type", "testing", "--img_size", "32", "--quick", "--threads", "1"]


def tables_of(capsys):
    """Returns what was printed, and the rows of every table in it, as dictionaries by the header."""
    text, tables = capsys.readouterr().out, []
    rows = [[cell.strip() for cell in x.strip("|").split("|")] for x in text.splitlines() if x.startswith("|")]
    for row, below in zip(rows, [*rows[1:], []]):
        if "".join(below).strip("-") == "" != "".join(below):
            header = row
            tables.append([])
        elif "".join(row).strip("-"):
            tables[-1].append(dict(zip(header, row, strict=True)))
    return text, tables


def check_ratios(table, header="ours / it"):
    ratios = [float(row[header]) for row in table]
    assert ratios[0] == 1
    assert min(ratios) > 0
