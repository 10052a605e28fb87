"""The job store on Firestore."""
