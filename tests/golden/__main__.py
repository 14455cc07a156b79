"""Store the documents of now, and say whom that breaks."""
from tests import golden

for version, document in golden.documents().items():
    if (golden.FOLDER / f"{version}.json").exists():
        for sentence in golden.breaking(golden.stored(version), document):
            print(f"{version}: BREAKS CLIENTS: {sentence}")
    golden.store(version, document)
    print(f"{version}: stored. Commit it with what changed it.")
