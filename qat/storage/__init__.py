"""Files and folders that appear whole or not at all, whatever ends the process; the standard library alone."""

from qat.storage.paths import local as local
from qat.storage.text import json_lines as json_lines
from qat.storage.text import parse_json as parse_json
from qat.storage.whole import new_file as new_file
from qat.storage.whole import new_folder as new_folder
from qat.storage.whole import repair as repair
from qat.storage.whole import write_text as write_text
