from .cli.main import main

raise SystemExit(main())  # the exit status of `python -m qm_cupy`
