"""Make the environment of SkyRL's Tinker server (800 MB), against which the tests hold our own; print its Python."""

import argparse

from textpolicy.tinker.server.environment import server_python

if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(server_python(print))
