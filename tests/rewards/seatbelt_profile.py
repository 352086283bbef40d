"""Profiles of Seatbelt, for the stand-in of its tool: the standard library alone, which a process of 100 MB imports."""

import re


def parsed(text):
    """Return the forms of a profile as nested lists; strings keep their quotes. Raises ValueError if malformed."""
    tokens = re.findall(r';[^\n]*|"(?:[^"\\]|\\.)*"|[()]|[^\s()";]+', text)
    assert re.sub(r"\s", "", "".join(tokens)) == re.sub(r"\s", "", text)  # nothing is left over, as an open quote
    stack = [[]]
    for token in tokens:
        if token == "(":
            stack.append([])
        elif token == ")":
            if len(stack) < 2:
                raise ValueError("a parenthesis closes nothing")
            inner = stack.pop()
            stack[-1].append(inner)
        elif not token.startswith(";"):
            stack[-1].append(token)
    if len(stack) > 1:
        raise ValueError("a parenthesis is open")
    return stack[0]


def files_of(profile, given):
    """Return the paths that a profile lets a program read, and those it lets it write; of devices Linux's own."""
    found = {"file-read*": [], "file-write*": [], "file-write-data": []}
    for _, *words in parsed(profile):
        for operation in {*found} & {word for word in words if isinstance(word, str)}:
            for _, argument in (word for word in words if isinstance(word, list)):
                path = given[argument[1].strip('"')] if isinstance(argument, list) else argument.strip('"')
                found[operation] += [path] if path != "/" else []  # Seatbelt gives the folder alone, Landlock all of it
    linux = ["/usr", "/lib", "/lib64", "/dev/stdin"]
    return found["file-read*"] + linux, found["file-write*"] + [*found["file-write-data"], "/dev/stdout", "/dev/stderr"]
