"""Lock for imports of transformers, and of packages that import it, in a process whose stages run in threads.

During its import transformers replaces its own module object. A thread that runs `from transformers import …` meanwhile
gets the old object, which lacks the names (Python 3.11, transformers 5).
"""

import threading

importing = threading.RLock()
