"""Networks and frozen encoders. Importing one module of this package imports no other."""

import logging

# diffusers imports it, and it then says at length which torch it was built for. Where its attention is
# asked for and does not run, `attention_backend` says so in a line.
logging.getLogger("xformers").setLevel(logging.ERROR)
