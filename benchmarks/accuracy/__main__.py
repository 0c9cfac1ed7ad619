from benchmarks.accuracy.cli import main

raise SystemExit(main())
