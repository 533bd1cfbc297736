"""A lock for the imports of transformers, and of what imports it, in a process whose stages run in threads.

While it is being imported, transformers puts another object in its own place. A thread that comes to
`from transformers import …` meanwhile is given the old one, which lacks the names (Python 3.11, transformers 5).
"""

import threading

importing = threading.RLock()
