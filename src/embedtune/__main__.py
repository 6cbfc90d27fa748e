"""`python -m embedtune`, which torchrun needs: `torchrun --nproc-per-node 2 -m embedtune fit mlm data.txt`."""

from embedtune.cli import main

if __name__ == "__main__":
    main()
