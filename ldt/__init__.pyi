from ldt.api import Model as Model
from ldt.api import load as load
from ldt.errors import InputError as InputError
from ldt.errors import RunError as RunError

__version__: str
