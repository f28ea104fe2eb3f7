"""The type checker of every signature under test: beartype, for which an int is also a float."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
