from benchmarks.witness.cli import main

raise SystemExit(main())
