from benchmarks.engine.cli import main

raise SystemExit(main())
