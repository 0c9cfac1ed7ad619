from benchmarks.kernels.cli import main

raise SystemExit(main())
