from truetune.cli import main

main()
