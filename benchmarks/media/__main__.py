from benchmarks.media.cli import main

raise SystemExit(main())
